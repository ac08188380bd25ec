import json

import numpy as np
import pytest
import torch
from torch import nn

from xq.models.cnn import CNNDecoder, CNNEncoder
from xq.models.linear import LinearDecoder, LinearEncoder, Sum, fit_pca_

SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "z_channels": 6}


def correlated(*shape: int) -> torch.Tensor:
    """Images whose principal components are well apart: random walks in both directions."""
    return torch.randn(shape).cumsum(-1).cumsum(-2) / 10


def patches(images: torch.Tensor, patch: int) -> np.ndarray:
    b, c, height, width = images.shape
    grid = images.reshape(b, c, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, c * patch**2).double().numpy()


def test_shapes():
    encoder, decoder = LinearEncoder(7, 4), LinearDecoder(7, 4)
    tokens = encoder(torch.randn(2, 3, 8, 20))
    assert tokens.shape == (2, 2, 5, 7)
    assert decoder(tokens).shape == (2, 3, 8, 20)
    assert encoder.stride == decoder.stride == 4
    assert decoder.last_layer is decoder.linear.weight


def test_a_token_sees_its_patch_alone():
    encoder, decoder = LinearEncoder(7, 4), LinearDecoder(7, 4)
    images = torch.randn(1, 3, 8, 12)
    moved = images.clone()
    moved[:, :, 4:, 4:8] += 1
    changed = (encoder(images) != encoder(moved)).any(-1)[0]
    assert changed.tolist() == [[False, False, False], [False, True, False]]
    tokens = torch.randn(1, 2, 3, 7)
    changed = (decoder(tokens) != decoder(tokens * changed[..., None])).any(1)[0]
    assert not changed[4:, 4:8].any()
    assert changed[:4].all()


@pytest.mark.parametrize("cls", [LinearEncoder, LinearDecoder])
def test_config_round_trip(cls):
    module = cls(7, 4, image_channels=1)
    again = cls(**json.loads(json.dumps(module.config())))
    assert again.config() == module.config() == {"dim": 7, "patch": 4, "image_channels": 1}
    assert again.linear.weight.shape == module.linear.weight.shape


@pytest.mark.parametrize(("dim", "patch"), [(1, 2), (5, 4), (12, 2), (24, 8)])
def test_pca_is_the_singular_value_decomposition(dim, patch):
    encoder, decoder = LinearEncoder(dim, patch), LinearDecoder(dim, patch)
    images = correlated(4, 3, 3 * 8, 5 * 8)
    fit_pca_(encoder, decoder, images)

    x = patches(images, patch)
    mean = x.mean(0)
    u, s, vt = np.linalg.svd(x - mean, full_matrices=False)
    best = (u[:, :dim] * s[:dim]) @ vt[:dim] + mean
    with torch.no_grad():
        tokens = encoder(images)
        decoded = decoder(tokens)
    np.testing.assert_allclose(patches(decoded, patch), best, atol=1e-4)
    scores = tokens.reshape(-1, dim).double().numpy()
    np.testing.assert_allclose(np.abs(scores), np.abs(u[:, :dim] * s[:dim]), atol=1e-3)
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-4)
    assert (np.diff(scores.var(0)) <= 0).all()
    np.testing.assert_allclose(decoder.linear.weight.detach(), encoder.linear.weight.detach().T)


def test_full_pca_is_the_identity():
    encoder, decoder = LinearEncoder(12, 2), LinearDecoder(12, 2)
    images = correlated(2, 3, 12, 12)
    fit_pca_(encoder, decoder, images)
    torch.testing.assert_close(decoder(encoder(images)), images, atol=1e-5, rtol=0)


def test_pca_is_repeatable_and_keeps_gradients():
    encoder, decoder = LinearEncoder(6, 4), LinearDecoder(6, 4)
    images = correlated(2, 3, 16, 16)
    fit_pca_(encoder, decoder, images)
    first = encoder.linear.weight.detach().clone()
    fit_pca_(encoder, decoder, images.flip(0))
    torch.testing.assert_close(encoder.linear.weight.detach(), first)
    largest = first.gather(1, first.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    decoder(encoder(images)).square().mean().backward()
    assert all(p.grad is not None for m in (encoder, decoder) for p in m.parameters())


def test_pca_of_flat_images_is_finite():
    encoder, decoder = LinearEncoder(6, 4), LinearDecoder(6, 4)
    images = torch.full((1, 3, 16, 16), 0.25)
    fit_pca_(encoder, decoder, images)
    torch.testing.assert_close(decoder(encoder(images)), images)


def test_pca_of_half_precision_modules():
    encoder, decoder = LinearEncoder(6, 4).bfloat16(), LinearDecoder(6, 4).bfloat16()
    images = correlated(2, 3, 16, 16)
    fit_pca_(encoder, decoder, images)
    assert decoder(encoder(images.bfloat16())).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("encoder", "decoder", "images", "message"),
    [
        (
            LinearEncoder(13, 2),
            LinearDecoder(13, 2),
            torch.randn(1, 3, 16, 16),
            "at most 12 components in patches of 3 x 2 x 2 numbers, got dim 13; lower `dim`",
        ),
        (
            LinearEncoder(6, 4),
            LinearDecoder(6, 4),
            torch.randn(1, 3, 8, 8),
            r"at least as many patches as dim 6, got 4 in images of shape \(1, 3, 8, 8\); give",
        ),
        (
            LinearEncoder(6, 4),
            LinearDecoder(5, 4),
            torch.randn(1, 3, 16, 16),
            r"of the same sizes, got \{'dim': 6.* and \{'dim': 5",
        ),
        (
            LinearEncoder(6, 4),
            LinearDecoder(6, 4),
            torch.full((1, 3, 16, 16), torch.nan),
            "fit_pca_ needs finite images, got NaN",
        ),
    ],
    ids=["dim", "few-patches", "sizes", "nan"],
)
def test_bad_pca(encoder, decoder, images, message):
    before = encoder.linear.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        fit_pca_(encoder, decoder, images)
    assert torch.equal(encoder.linear.weight, before)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 8, 8, 3), r"LinearEncoder expects channel-first images \(b, 3, H, W\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int32), "LinearEncoder expects floating-point images"),
        (
            torch.zeros(1, 3, 8, 9),
            r"LinearEncoder needs .* its stride 4, got \(8, 9\)",
        ),
    ],
    ids=["channel-last", "integers", "width"],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        LinearEncoder(6, 4)(images)


def test_bad_tokens():
    with pytest.raises(ValueError, match=r"LinearDecoder expects channel-last tokens \(b, h, w, 6"):
        LinearDecoder(6, 4)(torch.zeros(1, 6, 2, 2))


@pytest.mark.parametrize("cls", [LinearEncoder, LinearDecoder])
@pytest.mark.parametrize("argument", ["dim", "patch", "image_channels"])
def test_bad_sizes(cls, argument):
    message = f"{cls.__name__} needs `{argument}` to be a positive integer, got 0"
    with pytest.raises(ValueError, match=message):
        cls(**{"dim": 5, argument: 0})


def test_sum_starts_at_its_linear_part():
    linear, cnn = LinearEncoder(5, 4), CNNEncoder(5, **SMALL, patch=2).zero_output_()
    encoder = Sum(linear, cnn)
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(encoder(images), linear(images))
    nn.init.normal_(cnn.quant_conv.weight)
    torch.testing.assert_close(encoder(images), linear(images) + cnn(images))

    straight, refined = LinearDecoder(5, 4), CNNDecoder(5, **SMALL, patch=2).zero_output_()
    tokens = torch.randn(2, 2, 3, 5)
    assert torch.equal(Sum(straight, refined)(tokens), straight(tokens))


def test_the_stride_of_a_sum():
    encoder = Sum(nn.Identity(), LinearEncoder(5, 4), CNNEncoder(5, **SMALL, patch=2))
    assert encoder.stride == 4
    assert not hasattr(Sum(nn.Identity()), "stride")


def test_sum_names_its_parts():
    linear, cnn = LinearEncoder(5, 4), CNNEncoder(5, **SMALL, patch=2)
    assert list(Sum(linear, cnn).parts) == ["0", "1"]
    named = Sum(linear=linear, cnn=cnn)
    assert named.parts["cnn"] is cnn
    assert {key.split(".")[1] for key in named.state_dict()} == {"linear", "cnn"}


@pytest.mark.parametrize("names", [None, ("linear", "cnn")], ids=["positions", "names"])
def test_sum_config_round_trip(names):
    parts = [LinearEncoder(5, 4), CNNEncoder(5, **SMALL, patch=2)]
    module = Sum(*parts) if names is None else Sum(**dict(zip(names, parts, strict=True)))
    again = Sum(**module.config())
    assert list(again.state_dict()) == list(module.state_dict())
    assert list(again.config().values()) == parts


def test_sum_of_one_module_twice_counts_it_twice():
    linear = LinearEncoder(5, 4)
    images = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(Sum(linear, linear)(images), 2 * linear(images))


def test_bad_sums():
    with pytest.raises(ValueError, match="Sum needs at least one module, got none"):
        Sum()
    unequal = Sum(LinearEncoder(5, 4), coarse=LinearEncoder(5, 8))
    message = r"one shape, got \{'0': \(1, 2, 2, 5\), 'coarse': \(1, 1, 1, 5\)\} from its parts"
    with pytest.raises(ValueError, match=message):
        unequal(torch.randn(1, 3, 8, 8))
