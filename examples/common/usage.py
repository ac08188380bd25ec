"""How many of its codes a tokenizer uses, by scale, step or branch."""

from itertools import product

from jaxtyping import Float
from torch import Tensor

from xq.metrics import CodebookUsage
from xq.quantizers import Quantizer, Wrapper


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


def usage_by_part(
    values: Float[Tensor, "*parts"], quantizer: Quantizer | Wrapper
) -> dict[str, float]:
    """Values of `Usage` by scale and by branch or step, such as "2x2, 1" for the first branch."""
    scales = [f"{h}x{w}" for h, w in quantizer.grids]
    # equal grids follow each other
    names = [f"{k + 1}: {name}" for k, name in enumerate(scales)]
    found = {}
    for place in product(*(range(length) for length in values.shape)):
        rest = place[1:] if names else place
        parts = [names[place[0]]] if names else []
        parts += [str(k + 1) for k in rest]
        found[", ".join(parts) or "codes"] = float(values[place])
    return found
