"""Entropies of a soft assignment of vectors to a learned codebook, exact, block by block.

The assignment is a softmax over all codes. Its N x K probabilities are computed a block of vectors
at a time and once more for the gradient, so that no more than a block of them is ever held.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from xq.quantizers.blocks import block_length, exact
from xq.quantizers.entropy import CodeEntropy, batch_entropy
from xq.quantizers.lookup.table import middle

# the logarithm of no chance at all; infinity times the zero that follows from it were NaN
_NEVER = -1e30


def distance_entropy(
    u: Float[Tensor, "*batch dim"],
    codes: Float[Tensor, "codebook_size dim"],
    temperature: float,
    *,
    across_processes: bool = True,
) -> CodeEntropy:
    """Entropies of the softmax of `-|u - code|^2 / temperature` (LlamaGen), in nats.

    Codes that are not finite take no part.

    Args:
        u: Vectors; receive gradients.
        codes: The codebook; receives gradients.
        temperature: Above 0.
        across_processes: Whether the batch is that of all processes.
    """
    u = u.reshape(-1, u.shape[-1])
    finite = codes.detach().square().sum(-1, keepdim=True) < torch.inf
    codes = codes.where(finite, 0.0)
    # |u|^2 is the same for all codes; around their middle the products keep their digits
    centre = middle(codes.detach())
    u, codes = u - centre, codes - centre
    bias = (-codes.square().sum(-1) / temperature).where(finite[:, 0], _NEVER)
    return softmax_entropy(u * (2 / temperature), codes, bias, across_processes=across_processes)


def softmax_entropy(
    u: Float[Tensor, "n dim"],
    codes: Float[Tensor, "codebook_size dim"],
    bias: Float[Tensor, " codebook_size"],
    *,
    across_processes: bool,
) -> CodeEntropy:
    """Entropies of the softmax of `u @ codes.T + bias`, in nats; all three receive gradients."""
    mass, total = torch.ops.xq.usage(u, codes, bias)
    tokens, maximum = u.new_ones(len(u)).sum(), math.log(len(codes))
    batch = batch_entropy(mass, tokens, 1 / len(codes), maximum, across_processes=across_processes)
    return CodeEntropy(total / tokens.clamp(min=1), batch, maximum)


@exact
def _usage(u: Tensor, codes: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Summed over vectors: the probability of each code, and the entropy of the softmax."""
    mass, entropy = torch.zeros_like(bias), bias.new_zeros(())
    for part in u.split(block_length(codes)):
        p, log_p, total = _softmax(part, codes, bias)
        mass += p.sum(0)
        entropy += total.log().sum() - torch.vdot(p.flatten(), log_p.flatten())
    return mass, entropy


@exact
def _usage_backward(
    u: Tensor, codes: Tensor, bias: Tensor, grad_mass: Tensor, grad_entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    to_u, to_codes, to_bias = torch.empty_like(u), torch.zeros_like(codes), torch.zeros_like(bias)
    length = block_length(codes)
    for part, out in zip(u.split(length), to_u.split(length), strict=True):
        p, log_p, _ = _softmax(part, codes, bias)
        grad = softmax_backward(p, log_p.mul_(-grad_entropy).add_(grad_mass))
        torch.mm(grad, codes, out=out)
        to_codes.addmm_(grad.t(), part)
        to_bias += grad.sum(0)
    return to_u, to_codes, to_bias


def _softmax(
    part: Tensor, codes: Tensor, bias: Tensor
) -> tuple[Float[Tensor, "n codes"], Float[Tensor, "n codes"], Float[Tensor, "n 1"]]:
    """Probabilities, scores relative to the best of a vector, and the sum of their exponentials.

    The logarithm of a probability is such a score less the logarithm of that sum, which cancels
    from gradients, and is near zero where entropies are.
    """
    scores = torch.addmm(bias, part, codes.t())
    scores -= scores.amax(-1, keepdim=True)
    p = scores.exp()
    total = p.sum(-1, keepdim=True)
    return p.div_(total), scores, total


def softmax_backward(
    p: Float[Tensor, "n codes"], grad: Float[Tensor, "n codes"]
) -> Float[Tensor, "n codes"]:
    """The gradient of scores from that of their probabilities; overwrites `grad`."""
    mean = torch.linalg.vecdot(p, grad)[:, None]
    return grad.sub_(mean).mul_(p)


def _usage_fake(u: Tensor, codes: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(bias), bias.new_empty(())


def _usage_backward_fake(
    u: Tensor, codes: Tensor, bias: Tensor, grad_mass: Tensor, grad_entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(codes), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def refuse(ctx: Any, *grads: Tensor) -> Any:
    """Stands for the gradient of a gradient."""
    raise NotImplementedError("entropies of learned codes and IBQ have no second derivative")


def _usage_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.xq.usage_backward(*ctx.saved_tensors, *grads)


# ops, so that a compiler keeps no block of the forward pass for the backward one
_LIBRARY = torch.library.Library("xq", "FRAGMENT")
_LIBRARY.define("usage(Tensor u, Tensor codes, Tensor bias) -> (Tensor, Tensor)")
_LIBRARY.define(
    "usage_backward(Tensor u, Tensor codes, Tensor bias, Tensor grad_mass, Tensor grad_entropy)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("usage", _usage, "CompositeExplicitAutograd")
_LIBRARY.impl("usage_backward", _usage_backward, "CompositeExplicitAutograd")
torch.library.register_fake("xq::usage", _usage_fake, lib=_LIBRARY)
torch.library.register_fake("xq::usage_backward", _usage_backward_fake, lib=_LIBRARY)
torch.library.register_autograd("xq::usage", _usage_gradient, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("xq::usage_backward", refuse, lib=_LIBRARY)
