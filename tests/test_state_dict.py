"""State-dict keys are part of the public interface: other people's checkpoints hold them.

The golden file has the keys and shapes of each class with state. After a change that is meant,
`python tests/test_state_dict.py` writes it anew; the changelog then says what moved where.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from xq.losses import LeCam
from xq.metrics import CodebookUsage
from xq.models import (
    AR,
    RAR,
    VAR,
    CNNDecoder,
    CNNEncoder,
    LinearDecoder,
    LinearEncoder,
    MaskGITDecoder,
    PatchDecoder,
    PatchEncoder,
    TiTokDecoder,
    TiTokEncoder,
    Tokenizer,
    ViTDecoder,
    ViTEncoder,
)
from xq.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    VQ,
    ChannelFirst,
    CodeSampling,
    DepthDropout,
    DiVeQ,
    EMACodebook,
    GradientCodebook,
    GumbelVQ,
    Masked,
    Perturbed,
    ProductQuantizer,
    Projected,
    Pyramid,
    RandomProjectionQuantizer,
    Refine,
    ResidualQuantizer,
    SimCodebook,
)

TIMM = {
    "image_size": 8,
    "patch_size": 4,
    "tokens": (1, 2),
    "options": {"embed_dim": 8, "depth": 1, "num_heads": 2},
}
GOLDEN = Path(__file__).parent / "golden" / "state_dict.json"


def ema(dim: int, codebook_size: int) -> VQ:
    return VQ(dim, codebook_size, codebook=EMACodebook)


def tokenizer() -> Tokenizer:
    sizes = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "z_channels": 6}
    quantizer = ProductQuantizer(ResidualQuantizer(VQ(3, 5), multiscale=(1, 2, 4)), P=2)
    return Tokenizer(CNNEncoder(6, **sizes), quantizer, CNNDecoder(6, **sizes))


VIT = {"image_size": 8, "patch_size": 4, "width": 4, "depth": 1, "heads": 2}
VQGAN = {"channels": 4, "multipliers": (1, 2, 1), "blocks": 1}

MODULES: dict[str, Callable[[], nn.Module]] = {
    "GradientCodebook": partial(GradientCodebook, 7, 4),
    "GradientCodebook-revive": partial(GradientCodebook, 7, 4, revive=0.1),
    "EMACodebook": partial(EMACodebook, 7, 4),
    "VQ": partial(VQ, 4, 7),
    "VQ-cosine": partial(VQ, 4, 7, metric="cosine"),
    "VQ-normalize": partial(VQ, 4, 7, normalize=True),
    "VQ-ema": partial(ema, 4, 7),
    "SimCodebook": partial(SimCodebook, 7, 4),
    "VQ-drawn-regularized": lambda: VQ(4, 7, sampling=CodeSampling(1.0), entropy_temperature=0.1),
    "IBQ": partial(IBQ, 4, 7),
    "GumbelVQ": partial(GumbelVQ, 4, 7),
    "LFQ": partial(LFQ, 5),
    "BSQ": partial(BSQ, 5),
    "FSQ": partial(FSQ, [8, 5, 5]),
    "VQ-diveq": lambda: VQ(4, 7, estimator=DiVeQ()),
    "RandomProjectionQuantizer": partial(RandomProjectionQuantizer, 5, 7, num_codebooks=2),
    "DepthDropout": partial(DepthDropout, 4),
    "Refine": partial(Refine, 3),
    "Pyramid": lambda: Pyramid((1, 2, 3), [Refine(3), Refine(3)]),
    "ResidualQuantizer-flat": lambda: ResidualQuantizer(VQ(4, 7), depth=3),
    "ResidualQuantizer-flat-shared": lambda: ResidualQuantizer(ema(4, 7), depth=3, shared=True),
    "ResidualQuantizer-list": lambda: ResidualQuantizer([VQ(4, 7), VQ(4, 7)]),
    "ResidualQuantizer-multiscale": lambda: ResidualQuantizer(VQ(4, 7), multiscale=(1, 2, 3)),
    "ResidualQuantizer-multiscale-unshared": lambda: ResidualQuantizer(
        VQ(4, 7), multiscale=(1, 2, 3), shared=False
    ),
    "ResidualQuantizer-multiscale-unrefined": lambda: ResidualQuantizer(
        VQ(4, 7), multiscale=Pyramid((1, 2, 3))
    ),
    "ResidualQuantizer-ten-scales": lambda: ResidualQuantizer(BSQ(4), depth=10, multiscale=True),
    "ProductQuantizer": lambda: ProductQuantizer(VQ(4, 7), P=2),
    "ProductQuantizer-shared": lambda: ProductQuantizer(VQ(4, 7), P=2, shared=True),
    "ProductQuantizer-list": lambda: ProductQuantizer([VQ(4, 7), ema(2, 7)]),
    "ProductQuantizer-of-residuals": lambda: ProductQuantizer(
        ResidualQuantizer(VQ(4, 7), depth=2), P=2
    ),
    "ResidualQuantizer-of-products": lambda: ResidualQuantizer(
        ProductQuantizer(VQ(4, 7), P=2), depth=2
    ),
    "ProductQuantizer-of-pyramids": lambda: ProductQuantizer(
        ResidualQuantizer(ema(4, 7), multiscale=(1, 2)), P=2
    ),
    "Projected": lambda: Projected(VQ(4, 7), dim=6),
    "ChannelFirst": lambda: ChannelFirst(VQ(4, 7)),
    "ChannelFirst-Projected": lambda: ChannelFirst(Projected(BSQ(4), dim=6)),
    "Masked": lambda: Masked(ema(4, 7)),
    "Perturbed": lambda: Perturbed(VQ(4, 7), 3),
    "LeCam": LeCam,
    "CodebookUsage": lambda: CodebookUsage(7, (2,), [(1, 1), (2, 2), (3, 3)]),
    "LinearEncoder": partial(LinearEncoder, 5, 2),
    "LinearDecoder": partial(LinearDecoder, 5, 2),
    "PatchEncoder": lambda: PatchEncoder(5, **VIT, feedforward=True),
    "PatchDecoder": lambda: PatchDecoder(5, **VIT),
    "ViTEncoder": lambda: ViTEncoder(4, **TIMM, branches=2),
    "ViTDecoder": lambda: ViTDecoder(4, **TIMM),
    "TiTokEncoder": lambda: TiTokEncoder(5, **VIT, tokens=3),
    "TiTokDecoder": lambda: TiTokDecoder(5, **VIT, tokens=3),
    "TiTokDecoder-vqgan": lambda: TiTokDecoder(
        5, **VIT, tokens=3, vqgan=MaskGITDecoder(6, 7, **VQGAN)
    ),
    "AR": lambda: AR(7, 2, code_shape=(2,), classes=3, width=8, depth=1, heads=2),
    "AR-pyramid": lambda: AR(7, ((1, 1), (1, 2)), text=(3, 4), width=8, depth=1, heads=1),
    "RAR": lambda: RAR(7, (5,), classes=3, width=8, depth=1, heads=2, hidden=12),
    "VAR": lambda: VAR(6, 7, (1, 2), code_shape=(2,), classes=3, depth=1, width=4, heads=2),
    "Tokenizer": tokenizer,
}


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in module.state_dict().items()}


def golden() -> dict[str, dict[str, list[int]]]:
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", MODULES)
def test_keys_and_shapes_are_golden(name):
    assert shapes(MODULES[name]()) == golden()[name]


def test_the_golden_file_has_nothing_else():
    assert list(golden()) == list(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_loading_is_strict(name):
    module = MODULES[name]()
    state = module.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*stranger"):
        module.load_state_dict({**state, "stranger": torch.zeros(1)})
    for key in state:
        rest = {other: tensor for other, tensor in state.items() if other != key}
        with pytest.raises(RuntimeError, match="Missing key"):
            module.load_state_dict(rest)


def test_pending_sums_are_not_saved():
    module = ema(4, 7)
    module(torch.randn(5, 4))
    assert not [key for key in module.state_dict() if "pending" in key]
    assert [name for name, _ in module.named_buffers() if "pending" in name]


@pytest.mark.parametrize("name", ["VQ-ema", "ResidualQuantizer-flat-shared"])
def test_the_state_resumes_training_bit_for_bit(name):
    first, second = MODULES[name](), MODULES[name]()
    for _ in range(3):
        first(torch.randn(40, 4))
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        x = torch.randn(40, 4)
        assert torch.equal(first(x).z, second(x).z)
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key]), key


def write() -> None:
    """Writes the golden file: one line a tensor."""
    blocks = []
    for name, make in MODULES.items():
        lines = [f'    "{key}": {shape}' for key, shape in shapes(make()).items()]
        body = ",\n".join(lines)
        blocks.append(f'  "{name}": {{\n{body}\n  }}' if lines else f'  "{name}": {{}}')
    GOLDEN.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    write()
