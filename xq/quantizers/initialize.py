"""Codebooks that start at the data: one call before training."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.distributed import broadcast_, gather_rows
from xq.quantizers.base import Quantizer
from xq.quantizers.codebook import Codebook
from xq.quantizers.kmeans import lloyd, plus_plus
from xq.quantizers.memo import forget
from xq.quantizers.wrapper import Wrapper

# vectors a code that k-means looks at, and never fewer than this
_VECTORS, _FEWEST = 64, 1 << 14
# walks after the first, for codebooks that several steps share
_AGAIN = 2


def initialize(
    quantizer: nn.Module,
    x: Shaped[Tensor, "..."],
    *,
    iterations: int = 10,
    seed: int = 0,
) -> None:
    """Sets all codebooks of a tree by k-means, in the order of the walk.

    Each is set (k-means++, then a few rounds of Lloyd's) before the next step sees what it leaves.
    A codebook that several steps share is set for the inputs of all of them. Statistics of running
    means are set as well; the first batch then counts as much as they do. Every process must call
    it: they gather their vectors, and end with the same codes.

    Args:
        quantizer: Any quantizer or wrapper with a codebook in it.
        x: Vectors as the quantizer takes them: several batches' worth are best, some 64 a code.
            A process may have none.
        iterations: Rounds of Lloyd's algorithm.
        seed: For the draws, alike on all processes.

    Raises:
        TypeError: If `quantizer` is none.
        ValueError: If there is no codebook, one cannot be set, `x` does not fit, has a value that
            is not finite, or is empty everywhere.

    Examples:
        >>> rq, vectors = ResidualQuantizer(VQ(8, 32), depth=2), torch.randn(2048, 8)
        >>> initialize(rq, vectors)
        >>> rq.eval()(vectors).indices.unique().numel()
        32
    """
    if not isinstance(quantizer, Quantizer | Wrapper):
        raise TypeError(
            f"initialize takes a quantizer or wrapper, got {type(quantizer).__name__}; "
            "of a tokenizer pass its quantizer, and its encoder's output"
        )
    if iterations < 0:
        raise ValueError(f"initialize needs iterations of zero or more, got {iterations}")
    books = [m for m in quantizer.modules() if isinstance(m, Codebook)]
    if not books:
        raise ValueError(
            f"initialize found no codebook in {type(quantizer).__name__}: sign and rounding codes "
            "(LFQ, BSQ, FSQ) have nothing to set"
        )
    walk = _Walk(iterations, seed)
    _walked(quantizer, x, books, walk.set_)
    if any(len(seen) > 1 for seen in walk.seen.values()):
        for _ in range(_AGAIN):
            walk.start_again()
            _walked(quantizer, x, books, walk.collect)
            walk.set_shared()


def _walked(quantizer: Any, x: Tensor, books: list[Codebook], watcher: Any) -> None:
    """Lets `watcher` see what every codebook gets to see of `x`."""
    try:
        for book in books:
            book.watcher = watcher
        quantizer.encode(x)
    finally:
        for book in books:
            # back to the class's own
            del book.watcher


class _Walk:
    """What each codebook has seen, and how it is set."""

    def __init__(self, iterations: int, seed: int) -> None:
        self.iterations = iterations
        self.generator = torch.Generator().manual_seed(seed)
        self.seen: dict[Codebook, list[Tensor]] = {}
        self.metric: dict[Codebook, str] = {}

    def set_(self, book: Codebook, u: Float[Tensor, "*batch dim"], metric: str) -> None:
        """Sets a codebook for what it sees now and has seen before."""
        first = book not in self.seen
        self.collect(book, u, metric)
        self._fit(book, first)
        # this call normalized or prepared the former codes
        forget()

    def collect(self, book: Codebook, u: Float[Tensor, "*batch dim"], metric: str) -> None:
        """Only looks."""
        most = max(_VECTORS * book.codebook_size, _FEWEST)
        rows = u.reshape(-1, book.dim).to(book.codes().dtype)
        rows = gather_rows(rows, most, book.process_group)
        if not len(rows):
            raise ValueError("initialize got no vectors, on any process")
        self.seen.setdefault(book, []).append(rows)
        self.metric[book] = metric

    def start_again(self) -> None:
        """Forgets what was seen."""
        self.seen = {}

    def set_shared(self) -> None:
        """Sets the codebooks that were seen more than once."""
        for book, seen in self.seen.items():
            if len(seen) > 1:
                self._fit(book, first=False)

    def _fit(self, book: Codebook, first: bool) -> None:
        rows, metric = torch.cat(self.seen[book]), self.metric[book]
        centres = book.codes().detach()
        if first:
            spread = F.normalize(rows, dim=-1) if metric == "cosine" else rows
            centres = plus_plus(spread, book.codebook_size, self.generator)
        centres, count = lloyd(rows, centres, self.iterations, self.generator, metric)
        # machines may round differently
        broadcast_([centres, count], book.process_group)
        book.load_codes(centres, count)
