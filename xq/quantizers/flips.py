"""Sign codes near a vector: those that differ from its signs where that costs least."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def cheapest_flips(cost: Float[Tensor, "*batch dim"], k: int) -> Bool[Tensor, "*batch near dim"]:
    """The `k` sets of channels with the smallest sums of costs, in that order, the empty one first.

    Exact: a set among the k cheapest has none but the k - 1 cheapest channels in it, since it costs
    as much as each of its subsets. Grows the sets by one channel after the other and keeps k.

    Args:
        cost: What each channel costs, not negative.
        k: At most `2**dim`.
    """
    dim = cost.shape[-1]
    costs, channels = cost.topk(min(dim, k - 1), largest=False)
    sums = cost.new_zeros(*cost.shape[:-1], 1)
    # a set is an integer: bit i stands for the i-th cheapest channel
    sets = torch.zeros_like(sums, dtype=torch.int64)
    for i in range(costs.shape[-1]):
        sums = torch.cat([sums, sums + costs[..., i : i + 1]], dim=-1)
        sets = torch.cat([sets, sets + 2**i], dim=-1)
        if sums.shape[-1] >= k:
            # the empty set stays first, whatever costs nothing too
            kept = sums[..., 1:].topk(k - 1, largest=False).indices + 1
            kept = torch.cat([torch.zeros_like(kept[..., :1]), kept], dim=-1)
            sums, sets = sums.gather(-1, kept), sets.gather(-1, kept)
    places = torch.arange(costs.shape[-1], device=cost.device)
    chosen = (sets[..., None] >> places & 1).bool()
    flips = torch.zeros(*sets.shape, dim, dtype=torch.bool, device=cost.device)
    return flips.scatter_(-1, channels[..., None, :].expand_as(chosen), chosen)
