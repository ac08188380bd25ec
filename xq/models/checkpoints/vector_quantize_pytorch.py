"""The quantizers of vector-quantize-pytorch (1.31, 1.32), out of whatever model holds them.

`load_checkpoint(path, prefix="vq.")` reads one that stands at `vq` in a model of one's own.

What a state dict does not tell is the library's default, unless its numbers say otherwise:

- `VectorQuantize` and `ResidualVQ`: codes of unit length are those of `use_cosine_sim`. Codes that
  are not the mean of their statistics were learned by gradient, and the statistics are left out.
  Running averages go on with its decay 0.8 and smoothing 1e-5, and no code is revived. Several
  heads become a product; heads that share a codebook are told by their projection alone. Without
  one, read the one codebook and wrap it: `ProductQuantizer(loaded, heads, shared=True)`.
- `LFQ`: its codes are +-1. Its first channel is the highest bit of an index, ours the lowest. With
  projections these are turned around, so indices are the same; without, each has its bits reversed.
  What was trained with `spherical=True` needs `into=Projected(BSQ(bits), dim)`, or its decoded
  vectors are too long; another `codebook_scale` than 1 is not read.
- `SimVQ` and `ResidualSimVQ`: the map of the codes is one linear layer without bias.
- `FSQ` keeps nothing, or its projections alone: give the levels, as in
  `into=Projected(FSQ([8, 5, 5, 5], bound="vqp"), dim)`. A `ResidualFSQ` has the same names, and is
  not read.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from xq.models.checkpoints.format import Format
from xq.models.checkpoints.key_table import Drop, KeyTable, Rename, Rule, Split
from xq.quantizers import (
    LFQ,
    VQ,
    EMACodebook,
    GradientCodebook,
    ProductQuantizer,
    Projected,
    Quantizer,
    ResidualQuantizer,
    SimCodebook,
)

Shapes = Mapping[str, Tensor]

_SMOOTHING = 1e-5
_AVERAGES = partial(EMACodebook, decay=0.8, smoothing=_SMOOTHING, revive=0.0)
_PROJECTIONS = [f"project_{way}.{kind}" for way in ("in", "out") for kind in ("weight", "bias")]


def _projected(state: Shapes, quantizer: Quantizer) -> nn.Module:
    if "project_in.weight" not in state:
        return quantizer
    inner, dim = state["project_in.weight"].shape
    if inner != quantizer.dim:
        raise ValueError(
            f"vector-quantize-pytorch projects to {inner} channels, its codes have {quantizer.dim}"
        )
    return Projected(quantizer, dim)


def _inner(state: Shapes) -> str:
    """Where the quantizer stands, in the names of xq."""
    return "quantizer." if "project_in.weight" in state else ""


def _as_they_are() -> list[Rule]:
    return [Rename(name, name) for name in _PROJECTIONS]


def _recognise_vq(state: Shapes) -> bool:
    return "_codebook.embed" in state


def _build_vq(state: Shapes) -> nn.Module:
    heads, _, dim = state["_codebook.embed"].shape
    leaf = _vq(state, "_codebook.")
    if heads > 1:
        return _projected(state, ProductQuantizer(leaf, heads))
    shared = len(state["project_in.weight"]) // dim if "project_in.weight" in state else 1
    return _projected(state, ProductQuantizer(leaf, shared, shared=True) if shared > 1 else leaf)


def _table_vq(state: Shapes) -> KeyTable:
    heads, _, dim = state["_codebook.embed"].shape
    inner = _inner(state)
    if heads > 1:
        paths = [f"{inner}branches.{p}." for p in range(heads)]
    elif inner and len(state["project_in.weight"]) > dim:
        paths = [f"{inner}branches.0."]
    else:
        paths = [inner]
    return KeyTable([*_as_they_are(), *_codebook_rules(state, "_codebook.", paths)])


def _vq(state: Shapes, old: str) -> VQ:
    codes = state[f"{old}embed"]
    if not codes.is_meta and not bool(state[f"{old}initted"]):
        raise ValueError(
            "vector-quantize-pytorch had not yet placed the codes by k-means, so there are none"
        )
    factory = GradientCodebook if _is_learned(state, old) else _AVERAGES
    return VQ(codes.shape[2], codes.shape[1], normalize=_is_unit(codes), codebook=factory)


def _is_unit(codes: Tensor) -> bool:
    if codes.is_meta:
        return False
    return bool((codes.float().norm(dim=-1) - 1).abs().max() < 1e-3)


def _is_learned(state: Shapes, old: str) -> bool:
    """Whether the codes are anything else than the means that the statistics tell."""
    codes = state[f"{old}embed"]
    if codes.is_meta:
        return False
    size = state[f"{old}cluster_size"].float()
    total, codes = state[f"{old}embed_avg"].float(), codes.float()
    smoothed = size + _SMOOTHING
    smoothed = smoothed * (size.sum(-1, keepdim=True) / smoothed.sum(-1, keepdim=True))
    means = total / smoothed[..., None]
    if _is_unit(codes):
        means = nn.functional.normalize(means, dim=-1)
    # of a code that nobody chose for long nothing but rounding is left
    seen = size > 1e-3
    far = (codes - means).abs().amax(-1) > 1e-2 * codes.abs().amax(-1)
    return bool((far & seen).any())


def _codebook_rules(state: Shapes, old: str, paths: list[str]) -> list[Rule]:
    """The rules of a codebook, a part for each of the quantizers that it is split over."""
    names = {"embed": "weight", "cluster_size": "count", "embed_avg": "total"}
    learned = _is_learned(state, old)
    rules: list[Rule] = []
    for theirs, ours in names.items():
        if learned and ours != "weight":
            rules.append(Drop(f"{old}{theirs}"))
        else:
            new = tuple(f"{path}codebook.{ours}" for path in paths)
            rules.append(Split(f"{old}{theirs}", new, torch.unbind, _stacked))
    if learned:
        return [*rules, Drop(f"{old}initted")]
    steps = tuple(f"{path}codebook.step" for path in paths)
    return [*rules, Split(f"{old}initted", steps, partial(_begun, len(steps)), _initted)]


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts))


def _begun(copies: int, initted: Tensor) -> list[Tensor]:
    """For the number of updates, which nobody counted there; one number, or of one axis before."""
    return [initted.reshape(()).long()] * copies


def _initted(steps: Sequence[Tensor]) -> Tensor:
    return torch.ones_like(steps[0], dtype=torch.bool)


def _depth(state: Shapes, name: str) -> int:
    return next(k for k in count() if f"layers.{k}.{name}" not in state)


def _recognise_residual(state: Shapes) -> bool:
    return "layers.0._codebook.embed" in state


def _build_residual(state: Shapes) -> nn.Module:
    depth = _depth(state, "_codebook.embed")
    steps = [_vq(state, f"layers.{k}._codebook.") for k in range(depth)]
    if any(step.normalize for step in steps):
        raise ValueError(
            "vector-quantize-pytorch's ResidualVQ with use_cosine_sim normalizes what is left "
            "after each step, a ResidualQuantizer the input alone: there is none like it"
        )
    if _shares(state, depth):
        return _projected(state, ResidualQuantizer(steps[0], depth, shared=True))
    return _projected(state, ResidualQuantizer(steps))


def _table_residual(state: Shapes) -> KeyTable:
    depth = _depth(state, "_codebook.embed")
    rules = _as_they_are()
    for k in range(depth):
        old, new = f"layers.{k}._codebook.", f"{_inner(state)}steps.{k}."
        if k and _shares(state, depth):
            rules.append(Drop(old))
        else:
            rules += _codebook_rules(state, old, [new])
    return KeyTable(rules)


def _shares(state: Shapes, depth: int) -> bool:
    """Whether all steps have copies of the same codes, as with `shared_codebook`."""
    codes = [state[f"layers.{k}._codebook.embed"] for k in range(depth)]
    if codes[0].is_meta or depth == 1:
        return False
    return all(torch.equal(codes[0], each) for each in codes)


def _recognise_lfq(state: Shapes) -> bool:
    return state.keys() - set(_PROJECTIONS) == {"mask"} and state["mask"].ndim == 1


def _build_lfq(state: Shapes) -> nn.Module:
    leaf = LFQ(len(state["mask"]))
    codebooks = len(state["project_in.weight"]) // leaf.dim if _inner(state) else 1
    return _projected(state, ProductQuantizer(leaf, codebooks) if codebooks > 1 else leaf)


def _table_lfq(state: Shapes) -> KeyTable:
    bits = len(state["mask"])

    def rows(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, bits)).flip(1).flatten(0, 1)

    def columns(tensor: Tensor) -> Tensor:
        return rows(tensor.T).T

    return KeyTable(
        [
            Rename("project_in.weight", "project_in.weight", rows, rows),
            Rename("project_in.bias", "project_in.bias", rows, rows),
            Rename("project_out.weight", "project_out.weight", columns, columns),
            Rename("project_out.bias", "project_out.bias"),
            Drop("mask"),
        ]
    )


def _recognise_sim(state: Shapes) -> bool:
    return "frozen_codebook" in state or "layers.0.frozen_codebook" in state


def _build_sim(state: Shapes) -> nn.Module:
    if "frozen_codebook" in state:
        return _sim(state["frozen_codebook"])
    depth = _depth(state, "frozen_codebook")
    return ResidualQuantizer([_sim(state[f"layers.{k}.frozen_codebook"]) for k in range(depth)])


def _sim(basis: Tensor) -> VQ:
    return VQ(basis.shape[1], basis.shape[0], codebook=SimCodebook)


def _table_sim(state: Shapes) -> KeyTable:
    pairs = [("layers.{k}.", "steps.{k}.codebook."), ("", "codebook.")]
    return KeyTable(
        [
            Rename(f"{old}{theirs}", f"{new}{ours}")
            for old, new in pairs
            for theirs, ours in (
                ("frozen_codebook", "basis"),
                ("code_transform.weight", "transform.weight"),
            )
        ]
    )


def _recognise_fsq(state: Shapes) -> bool:
    return state.keys() == set(_PROJECTIONS)


def _build_fsq(state: Shapes) -> nn.Module:
    channels, dim = state["project_in.weight"].shape
    raise ValueError(
        "vector-quantize-pytorch's FSQ does not save its levels; give them, as in "
        f'into=Projected(FSQ([8, 5, 5, 5], bound="vqp"), {dim}), which are {channels} here'
    )


def _table_fsq(state: Shapes) -> KeyTable:
    return KeyTable(_as_they_are())


def _formats() -> tuple[Format, ...]:
    parts: list[Any] = [
        ("", "VectorQuantize", _recognise_vq, _build_vq, _table_vq),
        ("_residual", "ResidualVQ", _recognise_residual, _build_residual, _table_residual),
        ("_lfq", "LFQ", _recognise_lfq, _build_lfq, _table_lfq),
        ("_simvq", "SimVQ", _recognise_sim, _build_sim, _table_sim),
        ("_fsq", "FSQ", _recognise_fsq, _build_fsq, _table_fsq),
    ]
    title = "vector-quantize-pytorch's"
    return tuple(
        Format(f"vector_quantize_pytorch{suffix}", f"{title} {name}", *rest)
        for suffix, name, *rest in parts
    )


FORMATS = _formats()
