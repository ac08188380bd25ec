"""A transformer in the names of CLIP, written out in einsums of float64: what others' files mean.

And states of small models in the names of their files, with random numbers.
"""

import torch
from torch import Tensor

State = dict[str, Tensor]


def normal(x: Tensor, state: State, name: str) -> Tensor:
    """Layer normalization over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    """A linear map, or a convolution over one place."""
    weight = state[f"{name}.weight"]
    return torch.einsum("...i,oi->...o", x, weight.flatten(1)) + state[f"{name}.bias"]


def attention(x: Tensor, state: State, name: str, heads: int) -> Tensor:
    width = x.shape[-1]
    parts = []
    for i in range(3):
        rows = slice(i * width, (i + 1) * width)
        part = torch.einsum("bni,oi->bno", x, state[f"{name}.in_proj_weight"][rows])
        part = part + state[f"{name}.in_proj_bias"][rows]
        parts.append(part.unflatten(-1, (heads, width // heads)))
    q, k, v = parts
    scores = torch.einsum("bihc,bjhc->bhij", q, k) / (width // heads) ** 0.5
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    joined = torch.einsum("bhij,bjhc->bihc", weights, v).flatten(2)
    return linear(joined, state, f"{name}.out_proj")


def transformer(x: Tensor, state: State, part: str, blocks: str, depth: int, heads: int) -> Tensor:
    """From the first normalization to the last block."""
    x = normal(x, state, f"{part}ln_pre")
    for i in range(depth):
        name = f"{part}{blocks}{i}"
        x = x + attention(normal(x, state, f"{name}.ln_1"), state, f"{name}.attn", heads)
        h = linear(normal(x, state, f"{name}.ln_2"), state, f"{name}.mlp.c_fc")
        h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
        x = x + linear(h, state, f"{name}.mlp.c_proj")
    return x


def transformer_shapes(part: str, blocks: str, width: int, depth: int) -> dict[str, list[int]]:
    shapes = {}
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"{part}{name}.weight": [width], f"{part}{name}.bias": [width]}
    for i in range(depth):
        name = f"{part}{blocks}{i}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{name}{norm}.weight": [width], f"{name}{norm}.bias": [width]}
        shapes |= {
            f"{name}attn.in_proj_weight": [3 * width, width],
            f"{name}attn.in_proj_bias": [3 * width],
            f"{name}attn.out_proj.weight": [width, width],
            f"{name}attn.out_proj.bias": [width],
            f"{name}mlp.c_fc.weight": [4 * width, width],
            f"{name}mlp.c_fc.bias": [4 * width],
            f"{name}mlp.c_proj.weight": [width, 4 * width],
            f"{name}mlp.c_proj.bias": [width],
        }
    return shapes


def random_state(shapes: dict[str, list[int]]) -> State:
    """Numbers that let every part matter: normalizations near one, maps that keep lengths."""
    state = {}
    for key, shape in shapes.items():
        state[key] = torch.randn(shape)
        if len(shape) > 1:
            state[key] /= (state[key].numel() / shape[0]) ** 0.5
        else:
            state[key] = 0.2 * state[key] + key.endswith("weight")
    return state


def in_float64(state: State) -> State:
    return {key: tensor.double() for key, tensor in state.items()}
