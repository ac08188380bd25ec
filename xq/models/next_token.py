"""What generators that make one token after another share: tokens, conditions, the loop."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from xq.models.cnn_blocks import check_sizes
from xq.models.conditions import MOST_CODES, check_rates
from xq.models.sampling import draw, guided
from xq.models.tokenizer import eval_mode
from xq.precision import eager, widen
from xq.pretrained import Pretrained
from xq.quantizers import Quantizer, Wrapper

NextTokenT = TypeVar("NextTokenT", bound="NextToken")
# a side, a shape such as (32,) or (16, 16), or the grids of a pyramid
Tokens = int | Sequence[int] | Sequence[Sequence[int]]


class NextToken(Pretrained, ABC):
    """A generator that makes tokens one after another, each with `P` indices at once.

    Attributes:
        codebook_size: How many values an index can take.
        token_shape: Shape of an image's tokens, as `generate` returns them.
        grids: The grids of a pyramid, coarse to fine; `()` without one.
        code_shape: Shape of one token's indices.
    """

    def __init__(
        self, codebook_size: int, tokens: Tokens, code_shape: Sequence[int], class_drop: float
    ) -> None:
        super().__init__()
        check_sizes(self, codebook_size=codebook_size)
        if codebook_size > MOST_CODES:
            raise ValueError(
                f"{type(self).__name__} would need a softmax over {codebook_size} codes; give it "
                "several smaller indices a token, as a ProductQuantizer makes"
            )
        self.codebook_size = codebook_size
        self.token_shape, self.grids = _token_shape(self, tokens)
        self.code_shape = tuple(code_shape)
        for size in self.code_shape:
            check_sizes(self, code_shape=size)
        check_rates(self, class_drop=class_drop)
        self.class_drop = class_drop

    @classmethod
    def of(
        cls: type[NextTokenT], quantizer: Any, tokens: Tokens = 16, **options: Any
    ) -> NextTokenT:
        """A generator of the tokens of a quantizer, or of the tree within its wrappers.

        Args:
            quantizer: A `Quantizer` or `Wrapper`.
            tokens: Of an image: a side, or a shape such as (16, 16) or (32,). Of a quantizer with
                `scales` they are known.
            options: Further arguments of the constructor.

        Raises:
            ValueError: If it is no quantizer, or an argument does not fit.
        """
        while isinstance(quantizer, Wrapper):
            quantizer = quantizer.quantizer
        if not isinstance(quantizer, Quantizer):
            raise ValueError(
                f"{cls.__name__}.of needs a quantizer, got {type(quantizer).__name__}; "
                "of a tokenizer, pass its .quantizer"
            )
        tokens = quantizer.grids if quantizer.scales else tokens
        # of the classes that derive from this one
        make: Any = cls
        return make(quantizer.codebook_size, tokens, code_shape=quantizer.code_shape, **options)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, those of all scales together."""
        return math.prod(self.token_shape)

    @property
    def heads_per_token(self) -> int:
        """Indices of one token, the P of a product."""
        return math.prod(self.code_shape)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        tokens: Any = [list(grid) for grid in self.grids] or list(self.token_shape)
        return {
            "codebook_size": self.codebook_size,
            "tokens": tokens,
            "code_shape": list(self.code_shape),
        }

    @abstractmethod
    def _labels(self, labels: Tensor, *, look: bool) -> Tensor:
        """The conditions, checked."""

    @abstractmethod
    def _condition(self, labels: Tensor, dropped: Tensor | None) -> Float[Tensor, "b n width"]:
        """What the transformer sees of conditions; of "none" where they are dropped."""

    @abstractmethod
    def _begin(self, condition: Tensor) -> Any:
        """What `_next` keeps from one token to the next."""

    @abstractmethod
    def _next(self, tokens: Int[Tensor, "b t P"], kept: Any) -> Float[Tensor, "b *code V"]:
        """Logits of the token after these; of all but the last one it has keys and values."""

    def _dropped(self, labels: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """Which conditions a training step leaves out."""
        if not self.training or not self.class_drop:
            return None
        draws = torch.rand(len(labels), device=labels.device, generator=generator)
        return draws < self.class_drop

    def _embedded(self, table: nn.Embedding, tokens: Int[Tensor, "b t P"]) -> Tensor:
        """The sum over a token's indices, each of which has `codebook_size` rows of the table."""
        rows = self.codebook_size * torch.arange(self.heads_per_token, device=tokens.device)
        return table(tokens + rows).sum(-2)

    def _split(self, logits: Tensor) -> Float[Tensor, "b t *code V"]:
        return logits.unflatten(-1, (*self.code_shape, self.codebook_size))

    def _checked(self, tokens: Tensor, labels: Tensor) -> tuple[Int[Tensor, "b t P"], Tensor]:
        """Tokens in a row and their conditions; values on the CPU alone are looked at."""
        flat = self._flat(tokens)
        labels = self._labels(labels, look=labels.device.type == "cpu")
        if len(labels) != len(flat):
            raise ValueError(
                f"{type(self).__name__} got tokens of {len(flat)} images and {len(labels)} labels"
            )
        return flat, labels

    def _flat(self, tokens: Tensor) -> Int[Tensor, "b t P"]:
        """Tokens in a row, in int64.

        Raises:
            ValueError: If they are of another shape, too many, or of another vocabulary.
        """
        name = type(self).__name__
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(f"{name} expects integer tokens, got {tokens.dtype}")
        flat = self._in_a_row(tokens)
        if eager(flat) and flat.device.type == "cpu" and flat.numel():
            low, high = (int(v) for v in torch.aminmax(flat))
            if low < 0 or high >= self.codebook_size:
                raise ValueError(
                    f"{name} expects tokens in 0..{self.codebook_size - 1}, got {low}..{high}; "
                    "were they made by a tokenizer of another size?"
                )
        return flat.long()

    def _in_a_row(self, tokens: Tensor) -> Tensor:
        shape, code = tuple(tokens.shape), self.code_shape
        batch_and_tokens = shape[: len(shape) - len(code)]
        if shape[len(batch_and_tokens) :] == code and len(batch_and_tokens) > 1:
            axes = batch_and_tokens[1:]
            if axes == self.token_shape or (len(axes) == 1 and 0 < axes[0] <= self.num_tokens):
                return tokens.reshape(shape[0], math.prod(axes), self.heads_per_token)
        whole = ", ".join(str(n) for n in ("b", *self.token_shape, *code))
        part = ", ".join(str(n) for n in ("b", "t", *code))
        raise ValueError(
            f"{type(self).__name__} expects tokens ({whole}), or ({part}) with the first t of "
            f"{self.num_tokens}, got shape {shape}; build it with the quantizer's code_shape and "
            "its grids, or the shape of its tokens"
        )

    def _cross_entropy(self, logits: Tensor, tokens: Int[Tensor, "b t P"]) -> Float[Tensor, ""]:
        want = (*tokens.shape[:2], *self.code_shape, self.codebook_size)
        if tuple(logits.shape) != want:
            raise ValueError(
                f"{type(self).__name__}.loss expects for these tokens logits of forward, {want}, "
                f"got {tuple(logits.shape)}"
            )
        return F.cross_entropy(widen(logits).flatten(0, -2), tokens.flatten())

    def _generate(
        self, labels: Tensor, guidance: Sequence[float], **options: Any
    ) -> Int[Tensor, "b ..."]:
        """One token after another; `guidance` has a weight for each, `options` are of `draw`."""
        labels = self._labels(labels, look=True)
        b, twice = len(labels), any(weight != 1 for weight in guidance)
        with eval_mode(self):
            condition = self._condition(labels, None)
            if twice:
                dropped = torch.ones(b, dtype=torch.bool, device=labels.device)
                condition = torch.cat([condition, self._condition(labels, dropped)])
            shape = (len(condition), self.num_tokens, self.heads_per_token)
            tokens = torch.zeros(shape, dtype=torch.long, device=labels.device)
            kept = self._begin(condition)
            for t, weight in enumerate(guidance):
                logits = self._next(tokens[:, :t], kept)
                if twice:
                    logits = guided(*logits.chunk(2), weight)
                drawn = draw(logits, **options).reshape(b, self.heads_per_token)
                # both halves go on with the same tokens
                tokens[:, t] = torch.cat([drawn, drawn]) if twice else drawn
        return tokens[:b].reshape(b, *self.token_shape, *self.code_shape)


def _token_shape(
    owner: nn.Module, tokens: Tokens
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """The shape of an image's tokens, and the grids of a pyramid."""
    sizes: Any = (tokens, tokens) if isinstance(tokens, int) else tuple(tokens)
    if sizes and all(isinstance(grid, list | tuple) and len(grid) == 2 for grid in sizes):
        grids = tuple((h, w) for h, w in sizes)
        if all(type(side) is int and side > 0 for grid in grids for side in grid):
            return (sum(h * w for h, w in grids),), grids
    elif len(sizes) in (1, 2) and all(type(side) is int and side > 0 for side in sizes):
        return sizes, ()
    raise ValueError(
        f"{type(owner).__name__} needs `tokens` as a side, a shape such as (16, 16) or (32,), or "
        f"the grids of a pyramid, which are its quantizer's .grids; got {tokens!r}"
    )
