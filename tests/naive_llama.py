"""LlamaGen's transformer, written plainly in the names of its files, from what its code does."""

import cmath

import torch


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x, places, base=10000.0):
    """Neighbouring channels as complex numbers; a share of them turns with each coordinate.

    `places` has a tuple of coordinates for each token, None for those of the condition, which
    become zero.
    """
    x = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    factors = torch.tensor([of_place(place, x.shape[-1], base) for place in places], dtype=x.dtype)
    return torch.view_as_real(x * factors).flatten(-2)


def of_place(place, pairs, base):
    if place is None:
        return [0.0] * pairs
    count = pairs // len(place)
    return [cmath.exp(1j * x * base ** (-j / count)) for x in place for j in range(count)]


def attention(x, state, name, heads, places):
    width, visible = x.shape[-1], torch.ones(x.shape[1], x.shape[1]).tril().bool()
    q, k, v = (x @ state[f"{name}.wqkv.weight"].T).split(width, dim=-1)
    results = []
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        mine, theirs = turned(q[..., part], places), turned(k[..., part], places)
        scores = mine @ theirs.mT / (width // heads) ** 0.5
        results.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v[..., part])
    return torch.cat(results, dim=-1) @ state[f"{name}.wo.weight"].T


def feed_forward(x, state, name):
    gate = torch.nn.functional.silu(x @ state[f"{name}.w1.weight"].T)
    return (gate * (x @ state[f"{name}.w3.weight"].T)) @ state[f"{name}.w2.weight"].T


def logits(x, state, depth, heads, places):
    """Of each position of a sequence of vectors."""
    for i in range(depth):
        layer = f"layers.{i}"
        y = norm(x, state[f"{layer}.attention_norm.weight"])
        x = x + attention(y, state, f"{layer}.attention", heads, places)
        y = norm(x, state[f"{layer}.ffn_norm.weight"])
        x = x + feed_forward(y, state, f"{layer}.feed_forward")
    return norm(x, state["norm.weight"]) @ state["output.weight"].T
