"""How often a tokenizer uses which codes, by scale, branch and step."""

from typing import Any

from jaxtyping import Int
from torch import Tensor

from xq.metrics import CodebookUsage, RunningUtilisation
from xq.models import Tokenizer

NOTE = (
    "used, perplexity and bits: all codes of the data set, counted exactly; utilisation: what VAR "
    "and XQ-GAN report, codes whose running mean of hits a batch reaches 0.08 of an even share of "
    "the finest scale's tokens, over full batches (all pictures, if there is none)"
)


class CodeCounts:
    """Counts the tokens of a data set.

    Args:
        tokenizer: Whose tokens they are.
        device: Where the counts are.
    """

    def __init__(self, tokenizer: Tokenizer, device: Any) -> None:
        self.quantizer = tokenizer.quantizer
        self.usage = CodebookUsage.of(self.quantizer).to(device)
        self.utilisation = RunningUtilisation.of(self.quantizer).to(device)

    def update(self, indices: Int[Tensor, "b ..."], *, as_batch: bool) -> None:
        """Counts tokens; `as_batch` says whether the running mean takes them."""
        self.usage.update(indices)
        if as_batch:
            self.utilisation.update(indices)

    def compute(self) -> list[dict[str, Any]]:
        """A record for each scale and each index of a token."""
        used, perplexity, bits = self.usage.compute()
        utilisation = self.utilisation.compute()
        records = []
        for place in (used >= 0).nonzero().tolist():
            where = tuple(place)
            name = {}
            if self.quantizer.grids:
                h, w = self.quantizer.grids[place[0]]
                name, place = {"scale": f"{h} x {w}"}, place[1:]
            if place:
                name["index"] = ", ".join(str(i) for i in place)
            values = {
                "used": used[where].item(),
                "perplexity": perplexity[where].item(),
                "bits": bits[where].item(),
                "utilisation": utilisation[where].item(),
            }
            records.append(name | values)
        return records
