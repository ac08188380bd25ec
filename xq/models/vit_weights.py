"""Weights of one vision transformer for another, of another size or another library."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from xq.backbones import imported
from xq.models.sizes import Pair
from xq.precision import widen

# what a source has beyond a backbone: classifiers and pooling
_UNUSED = ("head.", "fc_norm.", "attn_pool.", "proj", "mask_token")
# an image tower of open_clip, part by part
_OPEN_CLIP = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.": "patch_embed.proj.",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
    "transformer.resblocks.": "blocks.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".in_proj_": ".qkv.",
    ".out_proj.": ".proj.",
    ".c_fc.": ".fc1.",
    ".c_proj.": ".fc2.",
}


def resampled(
    positions: Float[Tensor, "1 n width"], before: Pair, after: Pair
) -> Float[Tensor, "1 m width"]:
    """Position embeddings of one grid for another: bicubic, with antialiasing."""
    if before == after:
        return positions
    grid = rearrange(widen(positions), "b (h w) c -> b c h w", h=before[0])
    grid = F.interpolate(grid, size=after, mode="bicubic", antialias=True)
    return rearrange(grid, "b c h w -> b (h w) c").to(positions.dtype)


@torch.no_grad()
def copy_weights_(name: str, backbone: Any, source: Any, grid: Pair, patch: Pair) -> None:
    """Sets a backbone of timm to the weights of a source, resampled.

    Args:
        name: What error messages call the backbone.
        backbone: With or without an embedding of patches.
        source: A teacher, a CLIP, or a vision transformer of timm or open_clip.
        grid: Of the backbone's patches.
        patch: Their size.

    Raises:
        ValueError: If parts, shapes or activations differ.
    """
    # a teacher's model, a CLIP's image tower, and what open_clip takes over from timm
    for inner in ("model", "visual", "trunk"):
        source = getattr(source, inner, source)
    state, want = _timm_state(source), backbone.state_dict()
    if "patch_embed.proj.weight" not in want:
        state = {k: v for k, v in state.items() if not k.startswith("patch_embed.")}
    _check_parts(name, state, want)
    _check_activation(name, backbone, source)
    before = getattr(source, "grid_size", None) or source.patch_embed.grid_size
    prefix = state["pos_embed"].shape[1] - before[0] * before[1]
    first, rest = state["pos_embed"][:, :prefix], state["pos_embed"][:, prefix:]
    state["pos_embed"] = torch.cat([first, resampled(rest, before, grid)], dim=1)
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.shape[2:] != patch:
        layers = imported("timm.layers", name, "timm")
        kernel = layers.resample_patch_embed(widen(kernel), list(patch))
        state["patch_embed.proj.weight"] = kernel
    for key, value in want.items():
        if value.shape != state[key].shape:
            raise ValueError(
                f"{name} has {key} of shape {tuple(value.shape)}, the source "
                f"{tuple(state[key].shape)}; name the backbone that the source is of"
            )
    backbone.load_state_dict(state)


def _timm_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a backbone in timm's names, without classifier and pooling."""
    # a teacher's are buffers outside the saved state
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    if "class_embedding" in state:
        for theirs, ours in _OPEN_CLIP.items():
            state = {key.replace(theirs, ours): value for key, value in state.items()}
        state["cls_token"] = state["cls_token"][None, None]
        state["pos_embed"] = state["pos_embed"][None]
    if "norm.weight" not in state:
        state = {key.replace("fc_norm.", "norm."): value for key, value in state.items()}
    return {key: value for key, value in state.items() if not key.startswith(_UNUSED)}


def _check_parts(name: str, state: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    missing, extra = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    if missing or extra:
        raise ValueError(
            f"{name} is not the network that the weights are of: they lack {len(missing)} parts "
            f"({', '.join(missing[:3])}) and have {len(extra)} others ({', '.join(extra[:3])})"
        )


def _check_activation(name: str, backbone: nn.Module, source: nn.Module) -> None:
    """QuickGELU has no weights by which one could tell it from GELU."""
    ours, theirs = _activations(backbone), _activations(source)
    if ours != theirs:
        raise ValueError(
            f"{name} has the activation {ours}, the source {theirs}; CLIP models of OpenAI have "
            "names with quickgelu, in timm and in open_clip"
        )


def _activations(model: nn.Module) -> str:
    names = {type(module).__name__ for module in model.modules()}
    return ", ".join(sorted(name for name in names if "GELU" in name or name == "SiLU")) or "none"
