"""Randomized autoregression: a next-token transformer that learns tokens in any order."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xq.models.cache import Cache
from xq.models.cnn_blocks import check_sizes
from xq.models.conditions import check_rates, checked_labels, class_rows
from xq.models.next_token import NextToken, Tokens
from xq.models.rar_blocks import RARBlock
from xq.models.sampling import check_sampling, growing_guidance
from xq.models.transformer import check_heads
from xq.precision import eager

# the class token and the class
_PREFIX = 2
# room that RAR's tables have, and its files with them, beyond the positions that are used
SPARE_POSITIONS, _SPARE_STEPS = 1024, 100


class _Kept(NamedTuple):
    """What sampling keeps from one token to the next."""

    classes: Tensor
    caches: list[Cache]


class RAR(NextToken):
    """Predicts tokens of a class in an order of one's choice, after training in random orders.

    Yu et al. 2024, "Randomized Autoregressive Visual Generation": training permutes the tokens of a
    share of the images, and this share anneals to none (`random_share`), so that sampling is in
    raster order. As the next position is no longer implied, each token also carries the position of
    the one to predict (section 3.2, "target-aware" positions). Layers are modulated by the class
    and the number of the step, queries and keys are normalized.

    A token of a product or a residual has P indices, whose embeddings are summed and which one
    vector predicts at once, independently given the tokens before. Positions are learned, one for
    each token, so grids, plain sequences and pyramids are treated alike.

    As in the released files, tables have 1024 positions and 100 steps more than there are tokens,
    and the vocabulary a mask after the codes. Nothing reads these.

    Args:
        codebook_size: Of the quantizer, how many values an index can take.
        tokens: Of an image: a side, a shape such as (32,) or (16, 16), or a pyramid's `.grids`.
        code_shape: Of the quantizer, the shape of a token's indices.
        classes: How many there are.
        width: Channels within the transformer.
        depth: Blocks.
        heads: Heads of attention.
        hidden: Channels within the perceptrons; four times the width by default.
        dropout: Rate after attention and in and after perceptrons, and of attention.
        class_drop: How often the class is left out in training mode.
        checkpointing: Recomputes each block in the backward pass of a training step.

    Raises:
        ValueError: If a size is not positive, heads do not fit, or a rate is none.

    Examples:
        >>> model = RAR(64, tokens=4, classes=10, width=32, depth=2, heads=2)
        >>> tokens, labels = torch.randint(64, (2, 4, 4)), torch.tensor([3, 7])
        >>> order = model.orders(2, random_share(step=0, start=125_000, end=187_500))
        >>> model.loss(model(tokens, labels, order), tokens, order).backward()
        >>> model.generate(labels).shape
        torch.Size([2, 4, 4])
    """

    def __init__(
        self,
        codebook_size: int,
        tokens: Tokens = 16,
        *,
        code_shape: Sequence[int] = (),
        classes: int = 1000,
        width: int = 768,
        depth: int = 24,
        heads: int = 16,
        hidden: int | None = None,
        dropout: float = 0.1,
        class_drop: float = 0.1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(codebook_size, tokens, code_shape, class_drop)
        hidden = 4 * width if hidden is None else hidden
        check_sizes(self, classes=classes, width=width, depth=depth, heads=heads, hidden=hidden)
        check_heads(self, width, heads)
        check_rates(self, dropout=dropout)
        self.classes, self.width, self.depth, self.heads = classes, width, depth, heads
        self.hidden, self.dropout, self.checkpointing = hidden, dropout, checkpointing
        rows = self.heads_per_token * codebook_size
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        places, steps = self.num_tokens + SPARE_POSITIONS, self.num_tokens + _SPARE_STEPS
        self.positions = nn.Parameter(torch.empty(1, places, width))
        self.next_positions = nn.Parameter(torch.empty(1, places, width))
        self.steps = nn.Parameter(torch.empty(1, steps, width))
        # codes, mask, classes, none
        self.embedding = nn.Embedding(rows + 1 + classes + 1, width)
        self.blocks = nn.ModuleList(RARBlock(width, heads, hidden, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, rows)
        self._start()

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON: `RAR(**model.config())`."""
        return super().config() | {
            "classes": self.classes,
            "width": self.width,
            "depth": self.depth,
            "heads": self.heads,
            "hidden": self.hidden,
            "dropout": self.dropout,
            "class_drop": self.class_drop,
            "checkpointing": self.checkpointing,
        }

    def orders(
        self,
        count: int,
        share: float,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "count n"]:
        """An order of all tokens for each image: random with probability `share`, or raster.

        Args:
            count: How many images.
            share: As `random_share` gives it.
            device: Of the result.
            generator: For the draws, on that device; torch's own by default.

        Raises:
            ValueError: If `share` is not in 0..1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"RAR.orders needs a share in 0..1, got {share}")
        n = self.num_tokens
        draws = torch.rand(count, n + 1, device=device, generator=generator)
        raster = torch.arange(n, device=device).expand(count, n)
        return torch.where(draws[:, :1] < share, draws[:, 1:].argsort(dim=1), raster)

    def forward(
        self,
        tokens: Shaped[Tensor, "..."],
        labels: Shaped[Tensor, "..."],
        order: Shaped[Tensor, "..."] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b t *code V"]:
        """The logits of each token in its order, given those before it in that order.

        Values are looked at on the CPU alone, where that does not wait for a device.

        Args:
            tokens: `(b, *tokens, *code_shape)`; in raster order also the first ones in a row,
                `(b, t, *code_shape)`.
            labels: `(b,)`, class ids in 0..classes - 1, or -1 for images of no class.
            order: For each image a permutation `(b, num_tokens)`: which token comes first, and so
                on. Raster order by default.
            generator: Draws which labels are left out, on their device; torch's own by default.

        Returns:
            `(b, t, *code_shape, codebook_size)`; a softmax makes them probabilities.

        Raises:
            ValueError: If tokens, labels or order are of another shape, number or range.
        """
        flat, labels = self._checked(tokens, labels)
        if order is not None:
            flat = self._ordered(flat, order)
        classes = self._condition(labels, self._dropped(labels, generator))
        x = self._inputs(flat[:, :-1], classes, order)
        condition = self._conditions(classes, 0, x.shape[1])
        recompute = self.checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            x = (
                checkpoint(block, x, condition, use_reentrant=False)
                if recompute
                else block(x, condition)
            )
        return self._logits(x[:, 1:], condition[:, 1:])

    def loss(
        self,
        logits: Shaped[Tensor, "..."],
        tokens: Shaped[Tensor, "..."],
        order: Shaped[Tensor, "..."] | None = None,
    ) -> Float[Tensor, ""]:
        """The mean cross entropy of all indices, in nats.

        Args:
            logits: From `forward`.
            tokens: What it was given.
            order: Likewise.

        Raises:
            ValueError: If these do not fit each other or the model.
        """
        flat = self._flat(tokens)
        return self._cross_entropy(logits, flat if order is None else self._ordered(flat, order))

    @torch.no_grad()
    def generate(
        self,
        labels: Shaped[Tensor, "..."],
        *,
        guidance: float = 1.0,
        power: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "b ..."]:
        """Samples the tokens of images in raster order, in eval mode, for `tokenizer.decode`.

        Keys and values of earlier tokens are kept, so each step computes one token alone.

        Args:
            labels: Classes `(b,)`, one an image.
            guidance: Of the class against none, where 1 is none, towards the last token; see
                `growing_guidance`.
            power: How late it grows.
            temperature: What logits are divided by.
            top_k: Draws among so many most probable codes alone; with 1 the result is certain.
            top_p: Draws among the most probable codes of this share alone.
            generator: For the draws, on the labels' device; torch's own by default.

        Raises:
            ValueError: If labels or another argument are out of range.
        """
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        check_sampling(self, guidance=guidance, **options)
        weights = growing_guidance(guidance, power, self.num_tokens)
        return self._generate(labels, weights, generator=generator, **options)

    def _labels(self, labels: Tensor, *, look: bool) -> Tensor:
        return checked_labels(self, labels, self.classes, look=look)

    def _condition(self, labels: Tensor, dropped: Tensor | None) -> Float[Tensor, "b 1 width"]:
        first = self.heads_per_token * self.codebook_size + 1
        return self.embedding(first + class_rows(labels, dropped, self.classes))[:, None]

    def _conditions(
        self, condition: Float[Tensor, "b 1 width"], start: int, count: int
    ) -> Float[Tensor, "b n width"]:
        """What modulates the layers at each position."""
        return F.silu(condition + self.steps[:, start : start + count])

    def _inputs(
        self, tokens: Int[Tensor, "b t P"], condition: Tensor, order: Tensor | None
    ) -> Float[Tensor, "b n width"]:
        """The class token, the class, and tokens with their own and the next one's position."""
        b, t = tokens.shape[:2]
        x = torch.cat([condition, self._embedded(self.embedding, tokens)], dim=1)
        here = self._at(self.positions, order, t)
        here = torch.cat([self.positions[:, 1:_PREFIX].expand(len(here), -1, -1), here], dim=1)
        x = x + here + self._at(self.next_positions, order, t + 1)
        first = (self.class_token + self.positions[:, :1]).expand(b, -1, -1)
        return torch.cat([first, x], dim=1)

    @staticmethod
    def _at(table: Tensor, order: Tensor | None, count: int) -> Float[Tensor, "b t width"]:
        """The positions of the first tokens in their order."""
        table = table[:, _PREFIX:]
        return table[:, :count] if order is None else table[0, order[:, :count]]

    def _logits(self, x: Tensor, condition: Tensor) -> Float[Tensor, "b t *code V"]:
        scale, shift = self.modulation(condition).chunk(2, dim=-1)
        return self._split(self.head(self.norm(x) * (1 + scale) + shift))

    def _ordered(self, tokens: Int[Tensor, "b t P"], order: Tensor) -> Int[Tensor, "b t P"]:
        want, whole = (len(tokens), self.num_tokens), tokens.shape[1] == self.num_tokens
        if tuple(order.shape) != want or order.dtype != torch.long or not whole:
            raise ValueError(
                f"RAR needs an order as {want} int64 numbers and all {self.num_tokens} tokens, got "
                f"{order.dtype} of shape {tuple(order.shape)} and {tokens.shape[1]} tokens; "
                "RAR.orders makes them"
            )
        if eager(order) and order.device.type == "cpu":
            raster = torch.arange(self.num_tokens).expand(want)
            if not torch.equal(order.sort(dim=1).values, raster):
                raise ValueError(
                    f"RAR needs an order with each of 0..{self.num_tokens - 1} once; RAR.orders "
                    "makes them"
                )
        return tokens.take_along_dim(order[..., None], dim=1)

    def _begin(self, condition: Tensor) -> _Kept:
        # nothing is predicted from the last token
        length = _PREFIX + self.num_tokens - 1
        return _Kept(condition, [Cache(length) for _ in self.blocks])

    def _next(self, tokens: Int[Tensor, "b t P"], kept: _Kept) -> Float[Tensor, "b *code V"]:
        t, start = tokens.shape[1], kept.caches[0].filled
        if t:
            x = self._embedded(self.embedding, tokens[:, -1:])
            x = (
                x
                + self.positions[:, _PREFIX + t - 1, None]
                + self.next_positions[:, _PREFIX + t, None]
            )
        else:
            x = self._inputs(tokens, kept.classes, None)
        condition = self._conditions(kept.classes, start, x.shape[1])
        for block, cache in zip(self.blocks, kept.caches, strict=True):
            x = block(x, condition, cache)
        return self._logits(x[:, -1:], condition[:, -1:])[:, 0]

    def _start(self) -> None:
        """RAR's start: narrow normals, and modulations of zero, so that blocks do nothing yet."""
        nn.init.zeros_(self.class_token)
        for table in (self.positions, self.next_positions, self.steps):
            nn.init.trunc_normal_(table, std=0.02)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(part.weight, std=0.02)
            if isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)
        for name, part in self.named_modules():
            if name.endswith("modulation"):
                nn.init.zeros_(part.get_parameter("weight"))


def random_share(step: int, start: int, end: int) -> float:
    """The share of images in random order: 1 until `start`, then falling linearly to 0 at `end`.

    Yu et al. 2024, section 3.2; there of 250000 steps `start` is 125000 and `end` 187500.

    Args:
        step: The number of the step.
        start: The step until which all are in random order.
        end: The step from which on none is.

    Raises:
        ValueError: If `end` is before `start`.
    """
    if end < start:
        raise ValueError(f"random_share needs start <= end, got {start} and {end}")
    if step < start:
        return 1.0
    return 0.0 if step >= end else (end - step) / (end - start)


def rar_b(codebook_size: int = 1024, tokens: Tokens = 16, **options: Any) -> RAR:
    """RAR-B, 261 M parameters at 1024 codes; `options` are those of `RAR`.

    Args:
        codebook_size: Of the quantizer.
        tokens: Of an image, as for `RAR`.
        **options: As for `RAR`.
    """
    return RAR(codebook_size, tokens, width=768, **options)


def rar_l(codebook_size: int = 1024, tokens: Tokens = 16, **options: Any) -> RAR:
    """RAR-L, 461 M parameters at 1024 codes; `options` are those of `RAR`.

    Args:
        codebook_size: Of the quantizer.
        tokens: Of an image, as for `RAR`.
        **options: As for `RAR`.
    """
    return RAR(codebook_size, tokens, width=1024, **options)
