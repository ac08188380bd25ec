"""XQ-GAN (Li et al. 2024), and ImageFolder and RobustTok, which are of the same code.

Both pipelines: vision transformers ("SC": VQ, VP2, MSVR10P2, MSBR10P2 and RobustTok files, those
trained on LAION and IMed, ImageFolder's) and the CNN ("V").

Shapes do not tell what the released files have: images and grids are square, the transformers are
DINOv2's, codes of one scale are normalized and those of several found by angle, ten scales up to
11 x 11. What differs is read with `load_checkpoint(path, into=tokenizer)`.

The way back, for models of one's own too, is `formats()["xqgan"].write(tokenizer)`.

Known and left out: the teachers (`semantic_model`, `detail_model`) and what only their losses use
(`sem_linear`), tables of levels, and counts of uses.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn

from xq.config import describe
from xq.models.checkpoints.format import Format
from xq.models.checkpoints.key_table import Drop, KeyTable, Rename, Rule
from xq.models.checkpoints.llamagen import cnn_sizes
from xq.models.cnn import CNNDecoder, CNNEncoder
from xq.models.tokenizer import Tokenizer
from xq.models.vit import ViTDecoder, ViTEncoder
from xq.quantizers import (
    BSQ,
    LFQ,
    VQ,
    ProductQuantizer,
    Pyramid,
    Quantizer,
    Refine,
    ResidualQuantizer,
)

SCALES = (1, 1, 2, 3, 3, 4, 5, 6, 8, 11)

Shapes = Mapping[str, Tensor]

# of DINOv2 in timm, by width
_BACKBONES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
_LEFT_OUT = (
    "semantic_model.",
    "detail_model.",
    "sem_linear.",
    "encoder.lvl1LC",
    "decoder.lvl1LC",
)


def _recognise(state: Shapes) -> bool:
    return {"encoder.latent_tokens", "decoder.to_pixel.model.weight"} <= state.keys()


def _build(state: Shapes) -> nn.Module:
    """The tokenizer of a file with vision transformers.

    Raises:
        ValueError: If the file is not laid out as the released ones are.
    """
    branches = len(state["encoder.lvl_embed.weight"]) - 1
    patch = state["encoder.model.patch_embed.proj.weight"].shape[-1]
    tokens = _side("queries", state["encoder.latent_tokens"].shape[1], branches)
    head = "linear" if state["decoder.to_pixel.model.weight"].ndim == 2 else "conv"
    quantizer = _quantizer(state, branches, tokens)
    options: dict[str, Any] = {"patch_size": patch, "tokens": tokens, "drop_path": 0.1}
    return Tokenizer(
        ViTEncoder(
            quantizer.dim, branches=branches, **options, **_backbone(state, "encoder.model.", patch)
        ),
        quantizer,
        ViTDecoder(
            quantizer.dim, head=head, **options, **_backbone(state, "decoder.model.", patch)
        ),
    )


def _backbone(state: Shapes, prefix: str, patch: int) -> dict[str, Any]:
    positions, width = state[f"{prefix}pos_embed"].shape[1:]
    if width not in _BACKBONES:
        raise ValueError(
            f"XQ-GAN's {prefix}pos_embed has {width} channels, DINOv2 has {tuple(_BACKBONES)}; "
            "build the tokenizer and give it as into="
        )
    registers = f"{prefix}reg_token" in state
    name = f"vit_{_BACKBONES[width]}_patch14_{'reg4_' if registers else ''}dinov2"
    # the class token has a position of its own where there are no registers
    side = _side("patches", positions if registers else positions - 1)
    return {"backbone": name, "image_size": side * patch}


def _quantizer(state: Shapes, branches: int, tokens: int) -> Quantizer:
    found = [_branch(state, path, tokens) for path in _paths(state, branches)]
    if branches == 1:
        return found[0]
    alike = all(describe(branch) == describe(found[0]) for branch in found)
    return ProductQuantizer(found[0], branches) if alike else ProductQuantizer(found)


def _paths(state: Shapes, branches: int) -> list[str]:
    return [f"quantizes.{p}." for p in range(branches)] if branches > 1 else ["quantize."]


def _branch(state: Shapes, path: str, tokens: int) -> Quantizer:
    codes, signs = f"{path}embedding.weight", f"{path}scaler"
    refinements = _refinements(state, path)
    scales = _number_of_scales(state, path)
    if codes in state and scales is None:
        codebook_size, dim = state[codes].shape
        return VQ(dim, codebook_size, normalize=True)
    if codes in state:
        codebook_size, dim = state[codes].shape
        leaf, shrink = VQ(dim, codebook_size, metric="cosine"), None
    else:
        dim = state["quant_conv.weight"].shape[0]
        leaf, shrink = _signs(dim, state[signs])
    pyramid = Pyramid(_scales(scales or 1, tokens), [Refine(dim) for _ in refinements])
    return ResidualQuantizer(leaf, multiscale=pyramid, shrink=shrink)


def _number_of_scales(state: Shapes, path: str) -> int | None:
    """As many as there are rows of counts; None for the quantizer of one scale, which has none.

    Weights that went the way back have no counts, and then the number of the released files.
    """
    uses = state.get(f"{path}ema_vocab_hit_SV")
    if uses is not None:
        return len(uses) if uses.ndim > 1 else None
    return len(SCALES) if _refinements(state, path) else None


def _signs(dim: int, scaler: Tensor) -> tuple[Quantizer, float | None]:
    """BSQ as in the released files, unless the sizes of codes say otherwise."""
    if scaler.is_meta:
        return _signed(BSQ, dim), None
    sizes: list[float] = scaler.tolist()
    first, close = sizes[0], partial(math.isclose, rel_tol=1e-4)
    shrink = sizes[1] / first if len(sizes) > 1 else 1.0
    is_power = all(close(size, first * shrink**k) for k, size in enumerate(sizes))
    spherical = close(first, dim**-0.5)
    if not is_power or not (spherical or close(first, 1.0)):
        raise ValueError(f"XQ-GAN's codes of {dim} bits have the sizes {sizes}")
    leaf = _signed(BSQ if spherical else LFQ, dim)
    return leaf, None if close(shrink, 1.0) else round(shrink, 6)


def _signed(kind: Callable[..., Quantizer], dim: int) -> Quantizer:
    # the original's entropy is that of single bits
    return kind(dim, group_size=1)


def _scales(number: int, tokens: int) -> tuple[int, ...]:
    if number == 1:
        return (tokens,)
    if (number, tokens) == (len(SCALES), SCALES[-1]):
        return SCALES
    raise ValueError(
        f"XQ-GAN's files do not tell their {number} scales up to {tokens} x {tokens}; the released "
        f"ones have {SCALES}. Build the tokenizer with others and give it as into="
    )


def _refinements(state: Shapes, path: str) -> list[str]:
    """The names of a branch's convolutions: shared by some scales, by all, or by none."""
    some, one, each = (f"{path}quant_resi.{name}" for name in ("qresi_ls.{}.", "qresi.", "{}."))
    if f"{one}weight" in state:
        return [one]
    pattern = some if f"{some.format(0)}weight" in state else each
    number = next(i for i in count() if f"{pattern.format(i)}weight" not in state)
    return [pattern.format(i) for i in range(number)]


def _table(state: Shapes) -> KeyTable:
    rules: list[Rule] = [Drop(name) for name in _LEFT_OUT]
    rules += [
        Rename("encoder.model.", "encoder.backbone."),
        Rename("encoder.latent_tokens", "encoder.latent_tokens"),
        Rename("encoder.lvl_embed.weight", "encoder.lvl_embed.weight"),
        *_projection("quant_conv.", "encoder.quant_conv."),
        Rename("decoder.model.", "decoder.backbone."),
        Rename("decoder.mask_token", "decoder.mask_token"),
        Rename("decoder.lvl_embed.weight", "decoder.lvl_embed.weight"),
        Rename("decoder.to_pixel.model.", "decoder.to_pixel."),
        *_projection("post_quant_conv.", "decoder.post_quant_conv."),
    ]
    for old, new in (
        ("quantizes.{p}.", "quantizer.branches.{p}."),
        ("quantize.", "quantizer."),
    ):
        rules += _branch_rules(state, old, new)
    return KeyTable(rules)


def _projection(old: str, new: str) -> list[Rule]:
    """A convolution of one pixel there, a linear map here."""
    return [
        Rename(f"{old}weight", f"{new}weight", _as_matrix, _as_kernel),
        Rename(f"{old}bias", f"{new}bias"),
    ]


def _as_matrix(kernel: Tensor) -> Tensor:
    return kernel[:, :, 0, 0]


def _as_kernel(matrix: Tensor) -> Tensor:
    return matrix[:, :, None, None]


def _branch_rules(state: Shapes, old: str, new: str) -> list[Rule]:
    """The names of a branch; an empty state dict gives those of the way back."""
    first = old.format(p=0)
    leaves = [new, f"{new}steps.0."]
    if _number_of_scales(state, first) is not None:
        leaves.reverse()
    # the last is for the way back alone, of `Perturbed`
    codes = [f"{leaf}codebook.weight" for leaf in (*leaves, f"{new}quantizer.")]
    shared = [
        Rename(f"{old}quant_resi.qresi_ls.{{k}}.", f"{new}grid.refine.{{k}}."),
        Rename(f"{old}quant_resi.{{k}}.", f"{new}grid.refine.{{k}}."),
    ]
    if f"{first}quant_resi.0.weight" in state:
        shared.reverse()
    one = Rename(f"{old}quant_resi.qresi.", f"{new}grid.refine.0.")
    is_one = f"{first}quant_resi.qresi.weight" in state
    return [
        *(Rename(f"{old}embedding.weight", name) for name in codes),
        *([one, *shared] if is_one else [*shared, one]),
        Drop(f"{old}scaler"),
        Drop(f"{old}ema_vocab_hit_SV"),
    ]


def _side(what: str, number: int, sets: int = 1) -> int:
    side = math.isqrt(number // sets)
    if sets * side**2 != number:
        raise ValueError(
            f"XQ-GAN has {number} {what} in {sets} square grids, which cannot be, and its files do "
            "not tell of others; build the tokenizer and give it as into="
        )
    return side


def _recognise_cnn(state: Shapes) -> bool:
    names = {"encoder.conv_blocks.0.res.0.conv1.weight", "quantize.embedding.weight"}
    return {*names, "quantize.ema_vocab_hit_SV"} <= state.keys()


def _build_cnn(state: Shapes) -> nn.Module:
    codebook_size, dim = state["quantize.embedding.weight"].shape
    sizes = cnn_sizes(state)
    quantizer = VQ(dim, codebook_size, normalize=True)
    return Tokenizer(CNNEncoder(dim, **sizes), quantizer, CNNDecoder(dim, **sizes))


def _table_cnn(state: Shapes) -> KeyTable:
    return KeyTable(
        [
            *(Drop(name) for name in _LEFT_OUT),
            # before the parts that these belong to in xq
            Rename("quant_conv.", "encoder.quant_conv."),
            Rename("post_quant_conv.", "decoder.post_quant_conv."),
            Rename("encoder.", "encoder."),
            Rename("decoder.", "decoder."),
            *_branch_rules(state, "quantize.", "quantizer."),
        ]
    )


FORMATS = (
    Format("xqgan", "XQ-GAN", _recognise, _build, _table),
    Format("xqgan_cnn", "XQ-GAN with a CNN", _recognise_cnn, _build_cnn, _table_cnn),
)
