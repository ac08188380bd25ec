"""How many of its codes a tokenizer uses, by scale, step or branch."""

from xq.metrics import CodebookUsage
from xq.quantizers import Quantizer


def used_shares(usage: CodebookUsage, quantizer: Quantizer) -> dict[str, float]:
    """The share of codes that appeared; of each scale (a mean over branches), step or branch."""
    shares = usage.compute().used
    if quantizer.scales:
        shares = shares.flatten(1).mean(1)
        names = [f"{i + 1}: {h} x {w}" for i, (h, w) in enumerate(quantizer.grids)]
    else:
        shares = shares.reshape(-1)
        kind = "branch" if quantizer.depth == 1 else "step"
        names = [f"{kind} {i + 1}" for i in range(len(shares))] if len(shares) > 1 else ["codes"]
    return dict(zip(names, shares.tolist(), strict=True))
