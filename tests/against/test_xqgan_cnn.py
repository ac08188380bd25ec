"""The CNN against XQ-GAN's own outputs; `__origin__` in each data file says what it holds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hashed import hashed_parameter

from xq.models.cnn import CNNDecoder, CNNEncoder

DATA = Path(__file__).parent / "data"
HASHED = {"channels": 32, "multipliers": (1, 2, 2), "blocks": 2, "z_channels": 8}
STORED = {"channels": 32, "multipliers": (1, 1), "blocks": 1, "z_channels": 4}


def load(*names: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for name in names:
        with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
            tensors |= {key: torch.from_numpy(file[key]) for key in file if key != "__origin__"}
    return tensors


@torch.no_grad()
def with_identity_projections(sizes) -> tuple[CNNEncoder, CNNDecoder]:
    """Networks as the original delimits them: without the 1x1 convolutions around the quantizer."""
    dim = sizes["z_channels"]
    encoder, decoder = CNNEncoder(dim, **sizes), CNNDecoder(dim, **sizes)
    for conv in (encoder.quant_conv, decoder.post_quant_conv):
        conv.weight.copy_(torch.eye(dim)[..., None, None])
        conv.bias.zero_()
    return encoder, decoder


def original_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {key: p for key, p in module.named_parameters() if "quant_conv" not in key}


@pytest.fixture
def with_hashed_weights():
    encoder, decoder = with_identity_projections(HASHED)
    with torch.no_grad():
        for prefix, module in (("encoder.", encoder), ("decoder.", decoder)):
            for key, parameter in original_parameters(module).items():
                parameter.copy_(hashed_parameter(prefix + key, tuple(parameter.shape)))
    return encoder, decoder


@pytest.fixture
def stored():
    return load(*(f"xqgan_cnn_stored_{i}" for i in range(4)))


@pytest.fixture
def with_stored_weights(stored):
    encoder, decoder = with_identity_projections(STORED)
    with torch.no_grad():
        for prefix, module in (("encoder.", encoder), ("decoder.", decoder)):
            parameters = original_parameters(module)
            assert {prefix + key for key in parameters} == {k for k in stored if prefix in k}
            for key, parameter in parameters.items():
                parameter.copy_(stored[prefix + key])
    return encoder, decoder


@torch.no_grad()
def test_hashed_weights(with_hashed_weights):
    encoder, decoder = with_hashed_weights
    data = load("xqgan_cnn_hashed")
    torch.testing.assert_close(encoder(data["images"]), data["tokens"], atol=2e-5, rtol=0)
    # from the stored tokens, so that the encoder's rounding is not counted twice
    torch.testing.assert_close(decoder(data["tokens"]), data["decoded"], atol=2e-5, rtol=0)


def test_stored_weights_and_gradient(stored, with_stored_weights):
    encoder, decoder = with_stored_weights
    images = stored["images"].requires_grad_()
    tokens = encoder(images)
    decoded = decoder(tokens)
    torch.testing.assert_close(tokens, stored["tokens"], atol=2e-5, rtol=0)
    torch.testing.assert_close(decoded, stored["decoded"], atol=2e-5, rtol=0)
    (gradient,) = torch.autograd.grad(decoded.square().mean(), images)
    # relative to the largest: the gradient of a mean over 768 numbers is small everywhere
    largest = stored["gradient"].abs().max().item()
    torch.testing.assert_close(gradient, stored["gradient"], atol=1e-4 * largest, rtol=0)
