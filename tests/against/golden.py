"""Golden numbers of other libraries: how to read them, and how near is near enough."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xq.quantizers import BSQ, LFQ, VQ, ProductQuantizer, Quantizer, ResidualQuantizer
from xq.quantizers.shrink import as_factor, power

DATA = Path(__file__).parent / "data"
Numbers = dict[str, Tensor]

# two codes whose squared distances differ by less may change places with the order of a sum
TIE = 1e-6
# peers floor or shift probabilities by this within the logarithm
EPS = 1e-5


def load(name: str) -> Numbers:
    """The arrays of a file; its `__origin__` says in words where they come from."""
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file if key != "__origin__"}


def below(numbers: Numbers, prefix: str) -> Numbers:
    """The entries `prefix.*`, by what follows."""
    prefix += "."
    return {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)}


def load_state(module: nn.Module, numbers: Numbers) -> None:
    """Sets parameters and buffers to `state.*`; all of them must be there."""
    state = below(numbers, "state")
    # peers do not count the updates of their averages
    state.update({key: torch.tensor(1) for key in module.state_dict() if key.endswith(".step")})
    module.load_state_dict(state)


def leaf(numbers: Tensor) -> Tensor:
    """An input that asks for its gradient."""
    return numbers.clone().requires_grad_()


def gradients(scalar: Tensor, x: Tensor, module: nn.Module | None = None) -> Numbers:
    """With respect to the input (`input`) and all parameters; zero where nothing arrives."""
    wanted = {"input": x, **(dict(module.named_parameters()) if module else {})}
    found = torch.autograd.grad(scalar, list(wanted.values()), retain_graph=True, allow_unused=True)
    zeros = [torch.zeros_like(tensor) for tensor in wanted.values()]
    found = [zero if grad is None else grad for grad, zero in zip(found, zeros, strict=True)]
    return dict(zip(wanted, found, strict=True))


def assert_values(actual: Tensor, expected: Tensor, atol: float = 2e-5) -> None:
    """Equal within an absolute tolerance: quantized vectors and losses."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def assert_gradient(
    actual: Tensor, total: Tensor, minus: Tensor | float = 0.0, tolerance: float = 1e-4
) -> None:
    """Equal to `total - minus` within a share of its largest entry: gradients of means are small.

    Where peers give the gradient of a sum of terms alone, `minus` is that of the other terms; the
    rounding of what is subtracted is allowed for.
    """
    expected = total - minus
    rounding = 4 * torch.finfo(total.dtype).eps * abs(torch.as_tensor(minus)).max().item()
    atol = tolerance * expected.abs().max().item() + rounding
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def assert_indices(quantizer: Quantizer, x: Tensor, actual: Tensor, expected: Tensor) -> None:
    """Equal, except where the two best codes are as good as each other.

    `x` is channel-last, and both are this library's form of indices.
    """
    assert actual.shape == expected.shape
    with torch.no_grad():
        clear = is_clear(quantizer, quantizer.bound(x).double(), expected)
    assert clear.float().mean() > 0.9
    assert torch.equal(actual * clear, expected * clear)


def is_clear(quantizer: Quantizer, u: Tensor, indices: Tensor) -> Tensor:
    """1 for each index whose code beats the second best by `TIE` or more, 0 for ties."""
    if isinstance(quantizer, ProductQuantizer):
        branches = list(quantizer.branches) * (quantizer.P if quantizer.shared else 1)
        axis = indices.ndim - len(quantizer.code_shape)
        parts = zip(branches, quantizer.split(u), indices.unbind(axis), strict=True)
        return torch.stack([is_clear(*part) for part in parts], dim=axis)
    if isinstance(quantizer, ResidualQuantizer):
        return _is_clear_in_steps(quantizer, u, indices)
    if isinstance(quantizer, LFQ | BSQ):
        return ((4 * quantizer.scale * u.abs()).amin(-1) >= TIE).long()
    assert isinstance(quantizer, VQ)
    codes = quantizer.decode(torch.arange(quantizer.codebook_size)).double()
    if quantizer.metric == "cosine":
        u, codes = F.normalize(u, dim=-1), F.normalize(codes, dim=-1)
    best, second = (u[..., None, :] - codes).square().sum(-1).topk(2, largest=False)[0].unbind(-1)
    return (second - best >= TIE).long()


def _is_clear_in_steps(quantizer: ResidualQuantizer, u: Tensor, indices: Tensor) -> Tensor:
    inner = len(quantizer.steps[0].code_shape)
    steps = list(quantizer.steps) * (quantizer.depth if quantizer.shared else 1)
    sums = [torch.zeros_like(u), *quantizer.partials(indices)]
    found = []
    for k, step in enumerate(quantizer.grid.split(indices, inner)):
        rest = quantizer.grid.down(u - sums[k], k)
        scale = as_factor(power(quantizer.step_shrink, k), u)
        found.append(is_clear(steps[k], rest / scale, step))
    return quantizer.grid.join(found, inner)


def reversed_bits(indices: Tensor, bits: int) -> Tensor:
    """Integers whose first bit was the highest, with it the lowest, or the other way around."""
    shifts = torch.arange(bits)
    return (((indices[..., None] >> shifts) & 1) << shifts.flip(0)).sum(-1)
