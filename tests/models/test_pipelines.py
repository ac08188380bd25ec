"""Both pipelines of XQ-GAN, ViT and CNN, with every kind of quantizer tree between their ends."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xq.losses import ContrastiveLoss, FeatureAlignment, Features, Teacher
from xq.models import (
    CNNDecoder,
    CNNEncoder,
    Tokenizer,
    ViTDecoder,
    ViTEncoder,
    next_scale_input,
    teacher_forcing,
)
from xq.quantizers import (
    BSQ,
    FSQ,
    LFQ,
    VQ,
    DepthDropout,
    EMACodebook,
    ProductQuantizer,
    Projected,
    Pyramid,
    Refine,
    ResidualQuantizer,
)

SCALES = (1, 2, 3, 4)


def pyramid(leaf) -> ResidualQuantizer:
    grid = Pyramid(SCALES, [Refine(leaf.dim) for _ in range(2)])
    return ResidualQuantizer(leaf, multiscale=grid, shared=True)


TREES = {
    "VQ-normalized": lambda: VQ(6, 16, normalize=True),
    "VQ-ema": lambda: VQ(6, 16, codebook=EMACodebook),
    "BSQ": lambda: BSQ(6),
    "FSQ": lambda: FSQ([4, 3, 3, 2]),
    "Residual": lambda: ResidualQuantizer(VQ(6, 16), depth=3),
    "multi-scale": lambda: pyramid(VQ(6, 16, metric="cosine")),
    "Product-VQ": lambda: ProductQuantizer(VQ(3, 16, normalize=True), P=2),
    "Product-multi-scale-VQ": lambda: ProductQuantizer(pyramid(VQ(3, 16, metric="cosine")), P=2),
    "Product-multi-scale-BSQ": lambda: ProductQuantizer(pyramid(BSQ(3)), P=2),
    "Product-multi-scale-LFQ": lambda: ProductQuantizer(pyramid(LFQ(3)), P=3),
    "Residual-Product": lambda: ResidualQuantizer(ProductQuantizer(VQ(3, 16), P=2), depth=3),
    "Projected": lambda: Projected(VQ(3, 16), dim=6),
}
PIPELINES = ("vit", "cnn")


def tokenizer(pipeline: str, quantizer) -> Tokenizer:
    """Images of 16 x 16 pixels to 4 x 4 tokens."""
    dim, P = quantizer.dim, getattr(quantizer, "P", 1)
    if pipeline == "cnn":
        sizes = {"channels": 8, "multipliers": (1, 1, 2), "blocks": 1, "z_channels": 8}
        return Tokenizer(CNNEncoder(dim, **sizes), quantizer, CNNDecoder(dim, **sizes))
    sizes = {"image_size": 16, "patch_size": 4, "tokens": 4}
    # from scratch, without the tiny start of the blocks
    sizes["options"] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 1.0}
    return Tokenizer(ViTEncoder(dim, branches=P, **sizes), quantizer, ViTDecoder(dim, **sizes))


def pictures(count: int = 8) -> Tensor:
    """Smooth images, so that a few steps are enough to learn something of them."""
    coarse = torch.randn(count, 3, 2, 2)
    return F.interpolate(coarse, size=16, mode="bilinear", align_corners=True).tanh()


class ColourTeacher(Teacher):
    """Knows the mean colour of an image, and of its quarters."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def extract(self, image):
        return Features(image.mean((2, 3)), F.adaptive_avg_pool2d(image, 2).movedim(1, -1))


@pytest.fixture(params=PIPELINES)
def pipeline(request) -> str:
    return request.param


@pytest.mark.parametrize("name", TREES)
def test_a_few_steps(pipeline, name):
    model = tokenizer(pipeline, TREES[name]())
    depth = getattr(getattr(model.quantizer, "branches", [model.quantizer])[0], "depth", 1)
    drop = DepthDropout(depth, p=0.5) if depth > 1 else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    image, errors = pictures(), []
    for _ in range(6):
        keep = drop(len(image), image.device) if drop else None
        found, q = model(image, keep)
        error = F.mse_loss(found, image)
        loss = error + q.losses.total()
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.9 * errors[0]
    # the image reaches the encoder's first weights through the quantizer, and not the loss alone
    first = next(p for p in model.encoder.parameters() if p.ndim == 4)
    (gradient,) = torch.autograd.grad(model(image).image.square().sum(), first)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("training", [True, False])
def test_tokens_hold_the_image(pipeline, name, training):
    model = tokenizer(pipeline, TREES[name]()).train(training)
    image = pictures(2)
    with torch.no_grad():
        found, q = model(image)
        indices = model.encode(image)
        assert torch.equal(indices, q.indices)
        assert torch.equal(model.quantizer.decode(indices), q.z)
        # the same vectors lie otherwise in memory, and convolutions round otherwise
        torch.testing.assert_close(model.decode(indices), found, atol=1e-5, rtol=0)
        torch.testing.assert_close([*model.partials(indices)][-1], found, atol=1e-5, rtol=0)
    assert found.shape == image.shape
    tokens = (sum(s * s for s in SCALES),) if model.quantizer.scales else (4, 4)
    assert indices.shape == (2, *tokens, *model.quantizer.code_shape)


def test_branches_of_the_vit_are_its_query_sets():
    model = tokenizer("vit", ProductQuantizer(VQ(3, 16), P=2)).eval()
    image = pictures(2)
    with torch.no_grad():
        features = model.encoder.features(image)
        assert features.shape == (2, 2 * 16, 16)
        projected = model.encoder.quant_conv(features).unflatten(1, (2, 4, 4))
        z = [model.quantizer.branches[p](projected[:, p]).z for p in range(2)]
        assert torch.equal(model(image).quantized.z, torch.cat(z, dim=-1))


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("Product-VQ", "patch"),
        ("Product-multi-scale-VQ", "token"),
        ("Product-multi-scale-BSQ", "token"),
    ],
)
def test_a_branch_is_aligned(pipeline, name, level):
    model = tokenizer(pipeline, TREES[name]())
    alignment = FeatureAlignment(ColourTeacher(), 3, level=level, loss=ContrastiveLoss(0.1))
    both = nn.ModuleList([model, alignment])
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-2)
    drop = DepthDropout(len(SCALES), p=0.5) if model.quantizer.scales else None
    image = pictures()
    before = how_far(model, alignment, image)
    for _ in range(12):
        depth = drop(len(image), image.device) if drop else None
        found, q = model(image, depth)
        keep = drop.is_full(depth) if drop else None
        aligned = alignment(image, model.quantizer.split(q.z)[-1], keep)
        loss = F.mse_loss(found, image) + q.losses.total() + aligned
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        for key, parameter in both.named_parameters():
            assert parameter.grad is not None, key
        optimizer.step()
    assert how_far(model, alignment, image) < before


@torch.no_grad()
def how_far(model, alignment, image) -> float:
    return alignment(image, model.quantizer.split(model(image).quantized.z)[-1]).item()


def test_only_the_aligned_branch_hears_of_the_teacher(pipeline):
    model = tokenizer(pipeline, ProductQuantizer(VQ(3, 16), P=2))
    alignment = FeatureAlignment(ColourTeacher(), 3)
    q = model(pictures()).quantized
    (gradient,) = torch.autograd.grad(
        alignment(pictures(), model.quantizer.split(q.z)[1]), q.z, allow_unused=True
    )
    assert not gradient[..., :3].any()
    assert gradient[..., 3:].any()


def test_the_projection_is_shared_with_the_teacher():
    model = tokenizer("vit", ProductQuantizer(VQ(3, 16), P=2))

    class WideTeacher(ColourTeacher):
        def extract(self, image):
            found = super().extract(image)
            return Features(F.pad(found.token, (0, 13)), found.patches)

    projection = model.encoder.quant_conv
    alignment = FeatureAlignment(WideTeacher(), 3, projector=projection)
    image = pictures()
    z = model(image).quantized.z.detach()
    (gradient,) = torch.autograd.grad(alignment(image, z[..., 3:]), projection.weight)
    assert gradient[:, :3].any()


@pytest.mark.parametrize("name", ["multi-scale", "Product-multi-scale-VQ"])
def test_a_generator_of_scales_reads_both(pipeline, name):
    model = tokenizer(pipeline, TREES[name]()).eval()
    with torch.no_grad():
        tokens = model.encode(pictures(2))
        inputs = teacher_forcing(model.quantizer, tokens)
        assert inputs.shape == (2, 4 + 9 + 16, model.quantizer.dim)
        first = next_scale_input(model.quantizer, tokens[:, :1]).input
        torch.testing.assert_close(first, inputs[:, :4])


def test_saved_and_loaded(pipeline, tmp_path):
    model = tokenizer(pipeline, TREES["Product-multi-scale-VQ"]()).eval()
    model.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    image = pictures(2)
    assert torch.equal(again.encode(image), model.encode(image))
    assert torch.equal(again(image).image, model(image).image)
