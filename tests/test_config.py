import json
import os
import sys
from functools import partial

import pytest
import torch
from torch import nn

from xq.config import build, describe
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
    Sum,
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
    DiVeQ,
    EMACodebook,
    GradientCodebook,
    GumbelVQ,
    Masked,
    Perturbed,
    ProductQuantizer,
    Projected,
    Pyramid,
    Quantized,
    Quantizer,
    RandomProjectionQuantizer,
    Refine,
    ResidualQuantizer,
    SimCodebook,
    fit,
    rotation_trick,
    straight_through,
)

SIZES = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "z_channels": 6, "patch": 2}
TIMM = {
    "image_size": (8, 12),
    "patch_size": 4,
    "tokens": (1, 2),
    "options": {"embed_dim": 8, "depth": 1, "num_heads": 2},
}
VIT = {"image_size": 8, "patch_size": 4, "width": 4, "depth": 1, "heads": 2}


class Rounding(Quantizer):
    """A leaf of one's own, of one channel."""

    def __init__(self, levels: int = 3) -> None:
        super().__init__()
        self.dim, self.codebook_size = 1, levels

    def quantize(self, u, depth=None):
        z = (u * (self.codebook_size - 1)).round().clamp(0, self.codebook_size - 1)
        indices = z.long().squeeze(-1)
        z = self.dequantize(indices)
        return Quantized(z, indices, fit(u, z))

    def dequantize(self, indices):
        return indices[..., None] / (self.codebook_size - 1)

    def config(self):
        return {"levels": self.codebook_size}


class Nameless(Rounding):
    """Without a config of its own."""

    config = Quantizer.config


class OwnCodebook(GradientCodebook):
    """A codebook of one's own."""


def own_estimator(u, z):
    """An estimator of one's own."""
    return straight_through(u, z)


def of_sizes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


MODULES = {
    "VQ": VQ(4, 7),
    "VQ-cosine": VQ(4, 7, metric="cosine"),
    "VQ-normalize-rotation": VQ(4, 7, normalize=True, estimator=rotation_trick),
    "VQ-ema": VQ(4, 7, codebook=partial(EMACodebook, decay=0.8, smoothing=0.1)),
    "VQ-revived": VQ(4, 7, codebook=partial(GradientCodebook, revive=0.1)),
    "LFQ": LFQ(6, temperature=0.5, group_size=3),
    "VQ-sim": VQ(4, 7, codebook=SimCodebook),
    "VQ-regularized": VQ(4, 7, entropy_temperature=0.1, across_processes=False),
    "VQ-drawn": ResidualQuantizer(VQ(4, 7, sampling=CodeSampling(0.5)), depth=2),
    "IBQ": IBQ(4, 7, entropy_temperature=None),
    "GumbelVQ": GumbelVQ(4, 7, temperature=0.5, hard=True),
    "LFQ-tanh": LFQ(6, bound="tanh"),
    "BSQ": BSQ(6, temperature=2.0, group_size=2),
    "FSQ": FSQ([8, 5, 5], bound="paper"),
    "ResidualQuantizer-of-FSQ": ResidualQuantizer(FSQ([8, 5, 5]), depth=2),
    "VQ-diveq": ResidualQuantizer(VQ(4, 7, estimator=DiVeQ(0.01)), depth=2),
    "RandomProjectionQuantizer": RandomProjectionQuantizer(5, 7, code_dim=3, num_codebooks=2),
    "Refine": Refine(3, ratio=0.25),
    "Pyramid": Pyramid((1, (2, 3), (4, 4)), [Refine(3)]),
    "ResidualQuantizer": ResidualQuantizer(VQ(4, 7), depth=3, shrink=0.5),
    "ResidualQuantizer-shared": ResidualQuantizer(VQ(4, 7), depth=3, shared=True),
    "ResidualQuantizer-list": ResidualQuantizer([VQ(4, 7), VQ(4, 7)]),
    "ResidualQuantizer-scales": ResidualQuantizer(VQ(4, 7), multiscale=(1, (2, 3), 4)),
    "ResidualQuantizer-published": ResidualQuantizer(BSQ(4), depth=10, multiscale=True),
    "ResidualQuantizer-pyramid": ResidualQuantizer(
        VQ(4, 7), multiscale=Pyramid((1, 2), [Refine(4, ratio=0.75)]), shared=False
    ),
    "ResidualQuantizer-list-of-scales": ResidualQuantizer(
        [VQ(4, 7), VQ(4, 7)], multiscale=Pyramid((1, 2))
    ),
    "ResidualQuantizer-resized": ResidualQuantizer(VQ(4, 7), multiscale=(1, 2)).with_scales((1, 3)),
    "ProductQuantizer": ProductQuantizer(VQ(4, 7), P=3),
    "ProductQuantizer-shared": ProductQuantizer(VQ(4, 7), P=3, shared=True),
    "ProductQuantizer-list": ProductQuantizer([VQ(4, 7), VQ(2, 7, metric="cosine")]),
    "ProductQuantizer-of-residuals": ProductQuantizer(
        ResidualQuantizer(VQ(4, 7, codebook=EMACodebook), depth=2), P=2
    ),
    "ResidualQuantizer-of-products": ResidualQuantizer(ProductQuantizer(LFQ(3), P=2), depth=2),
    "ChannelFirst-Projected": ChannelFirst(Projected(VQ(4, 7), dim=9)),
    "Masked": Masked(Projected(VQ(4, 7), dim=9)),
    "Perturbed": Perturbed(VQ(4, 7), 3, alpha=0.5, beta=0.25),
    "CNNEncoder": CNNEncoder(4, **SIZES),
    "CNNDecoder": CNNDecoder(4, **SIZES),
    "LinearEncoder": LinearEncoder(4, 2),
    "LinearDecoder": LinearDecoder(4, 2, image_channels=1),
    "Sum": Sum(LinearDecoder(4, 4), CNNDecoder(4, **SIZES)),
    "PatchEncoder": PatchEncoder(5, **VIT, feedforward=True),
    "PatchDecoder": PatchDecoder(5, **VIT | {"image_size": (8, 12)}),
    "ViTEncoder": ViTEncoder(4, **TIMM, branches=2, drop_path=0.1),
    "ViTDecoder": ViTDecoder(4, **TIMM, head="conv", checkpointing=True),
    "TiTokEncoder": TiTokEncoder(5, **VIT, tokens=3, mixed=True),
    "TiTokDecoder": TiTokDecoder(5, **VIT, tokens=3),
    "TiTokDecoder-vqgan": TiTokDecoder(
        5, **VIT, tokens=3, vqgan=MaskGITDecoder(6, 7, channels=4, multipliers=(1, 2, 1), blocks=1)
    ),
    "AR": AR(7, (2, 3), code_shape=(2,), classes=3, width=8, depth=1, heads=2, drop_path=0.1),
    "AR-pyramid": AR(7, ((1, 1), (1, 2)), text=(3, 4), width=8, depth=1, heads=1, class_drop=0.2),
    "RAR": RAR(7, (5,), classes=3, width=8, depth=1, heads=2, hidden=12, dropout=0.2),
    "VAR": VAR(6, 8, (1, (2, 3)), code_shape=(2,), depth=1, width=4, heads=2, head="bits"),
    "Tokenizer": Tokenizer(LinearEncoder(4, 2), VQ(4, 7), LinearDecoder(4, 2)),
}


@pytest.mark.parametrize("name", MODULES)
def test_there_and_back_through_json(name):
    module = MODULES[name]
    text = json.dumps(describe(module))
    again = build(json.loads(text))
    assert type(again) is type(module)
    assert json.dumps(describe(again)) == text
    assert of_sizes(again) == of_sizes(module)
    assert repr(again) == repr(module)


@pytest.mark.parametrize("name", [n for n, m in MODULES.items() if isinstance(m, Quantizer)])
def test_the_same_quantizer_after_loading(name):
    quantizer = MODULES[name]
    again = build(json.loads(json.dumps(describe(quantizer))))
    again.load_state_dict(quantizer.state_dict())
    h, w = quantizer.grids[-1] if quantizer.scales else (3, 2)
    x = torch.randn(2, h, w, quantizer.dim)
    for mine, theirs in zip(quantizer.eval()(x), again.eval()(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_what_a_configuration_looks_like():
    quantizer = VQ(4, 7, codebook=partial(EMACodebook, decay=0.8), estimator=rotation_trick)
    assert describe(quantizer) == {
        "class": "VQ",
        "dim": 4,
        "codebook_size": 7,
        "metric": "euclidean",
        "normalize": False,
        "codebook": {
            "class": "EMACodebook",
            "decay": 0.8,
            "revive": 0.02,
            "revive_below": 0.0,
            "smoothing": 0.0,
        },
        "estimator": {"function": "rotation_trick"},
        "sampling": None,
        "entropy_temperature": None,
        "across_processes": True,
    }


def test_a_codebook_comes_back_as_its_factory():
    factory = build({"class": "EMACodebook", "decay": 0.8})
    assert isinstance(factory, partial)
    codebook = factory(7, 4)
    assert isinstance(codebook, EMACodebook)
    assert codebook.decay == 0.8


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2.5, "text", [], {}, [1, [2, "x"]], {"a": {"b": [None]}}],
    ids=repr,
)
def test_plain_values_stay(value):
    assert describe(value) == value
    assert build(value) == value


def test_tuples_become_lists():
    assert describe((1, (2, 3))) == [1, [2, 3]]


def test_functions_go_by_name():
    assert describe(straight_through) == {"function": "straight_through"}
    assert build({"function": "straight_through"}) is straight_through


def test_an_own_class_comes_back_when_passed_in():
    quantizer = ProductQuantizer(ResidualQuantizer(Rounding(5), depth=2), P=2)
    config = json.loads(json.dumps(describe(quantizer)))
    with pytest.raises(ValueError, match=r"'Rounding' is not a part of xq; .*classes=\[\.\.\.\]"):
        build(config)
    again = build(config, [Rounding])
    assert again.branches[1].steps[1].codebook_size == 5
    assert json.dumps(describe(again)) == json.dumps(config)


def test_an_own_codebook_and_estimator_come_back_when_passed_in():
    quantizer = VQ(4, 7, codebook=OwnCodebook, estimator=own_estimator)
    config = json.loads(json.dumps(describe(quantizer)))
    with pytest.raises(ValueError, match="'OwnCodebook' is not a part of xq"):
        build(config, [own_estimator])
    with pytest.raises(ValueError, match="'own_estimator' is not a part of xq"):
        build(config, [OwnCodebook])
    again = build(config, [OwnCodebook, own_estimator])
    assert type(again.codebook) is OwnCodebook
    assert again.estimator is own_estimator


REFUSED = [
    "os.system",
    "system",
    "Path",
    "eval",
    "exec",
    "__import__",
    "nn.Linear",
    "Linear",
    "torch.load",
    "xq.quantizers.VQ",
    "base",
    "importlib",
    "__builtins__",
    "__loader__",
    "_SignQuantizer",
    "",
]


@pytest.mark.parametrize("key", ["class", "function"])
@pytest.mark.parametrize("name", REFUSED)
def test_other_names_are_refused(key, name):
    with pytest.raises(ValueError, match="is not a part of xq; pass your own class"):
        build({key: name})


def test_nothing_is_imported_or_executed(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(os, "system", calls.append)
    (tmp_path / "trap_for_config.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("os.system", "trap_for_config", "trap_for_config.Trap"):
        for config in (
            {"class": name, "command": "true"},
            {"class": "VQ", "dim": 4, "codebook_size": 7, "codebook": {"class": name}},
            {"class": "VQ", "dim": 4, "codebook_size": 7, "estimator": {"function": name}},
            [{"function": name}],
        ):
            with pytest.raises(ValueError, match="is not a part of xq"):
                build(config)
    assert not calls
    assert "trap_for_config" not in sys.modules


def test_a_function_is_not_called():
    with pytest.raises(ValueError, match='"class" names straight_through, which is a function'):
        build({"class": "straight_through", "u": 1, "z": 2})


@pytest.mark.parametrize("name", [3, None, ["VQ"], {"a": "VQ"}], ids=repr)
def test_a_name_is_a_string(name):
    with pytest.raises(ValueError, match="goes by its name, got"):
        build({"class": name})
    with pytest.raises(ValueError, match="goes by its name, got"):
        build({"function": name})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class": "VQ", "dim": 4}, "cannot build VQ from .*missing .*'codebook_size'"),
        ({"class": "BSQ", "dim": 4, "size": 2}, "cannot build BSQ from .*unexpected .*'size'"),
        ({"class": "VQ", "dim": "4", "codebook_size": 7}, "cannot build VQ from"),
        ({"class": "Quantizer"}, "cannot build Quantizer from .*abstract"),
        (
            {
                "class": "VQ",
                "dim": 4,
                "codebook_size": 7,
                "codebook": {"class": "EMACodebook", "speed": 1},
            },
            "cannot build VQ from .*unexpected .*'speed'",
        ),
        ({"class": "BSQ", "dim": 0}, "BSQ needs 1 to 62 channels"),
    ],
    ids=["missing", "unknown", "type", "abstract", "codebook", "value"],
)
def test_wrong_arguments(config, message):
    with pytest.raises(ValueError, match=message):
        build(config)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (nn.Linear(2, 2), r"Linear has no config\(\): add one"),
        (Nameless(), r"Nameless has no config\(\): return its constructor's arguments"),
        (ChannelFirst(Nameless()), r"Nameless has no config\(\)"),
        (ProductQuantizer(Nameless(), P=2), r"Nameless has no config\(\)"),
        (object(), "cannot write <object object .* as JSON"),
        (torch.zeros(2), "cannot write tensor.* as JSON"),
        (VQ(4, 7, estimator=lambda u, z: z), "cannot write <function <lambda> .* with a name"),
        (partial(rotation_trick), "cannot write functools.partial"),
    ],
    ids=["module", "leaf", "wrapped", "nested", "object", "tensor", "lambda", "partial"],
)
def test_what_has_no_json_form(value, message):
    with pytest.raises(TypeError, match=message):
        describe({"outer": [value]})


def test_one_module_twice_in_a_list_would_come_back_as_two():
    branch = VQ(4, 7)
    with pytest.raises(TypeError, match=r"holds one module twice .* shared=True"):
        describe(ProductQuantizer([branch, branch]))
