"""The next-token transformer of LlamaGen, with any number of indices a token."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xq.models.ar_blocks import ARBlock, rotations
from xq.models.cache import Cache
from xq.models.cnn_blocks import check_sizes
from xq.models.conditions import Classes, Text, check_rates
from xq.models.next_token import NextToken, Tokens
from xq.models.sampling import check_sampling
from xq.models.transformer import check_heads
from xq.precision import widen


class _Kept(NamedTuple):
    """What sampling keeps from one token to the next."""

    condition: Tensor
    turns: Tensor
    scales: Tensor | None
    caches: list[Cache]


class AR(NextToken):
    """Predicts tokens in raster order from a class or a text: LlamaGen, for any tokenizer.

    Sun et al. 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation",
    section 2.2: LLaMA's blocks, rotary positions in two dimensions, the condition as the first
    tokens of the sequence, dropped at times for guidance.

    A token of a product or a residual has P indices. Their embeddings are summed, and one vector
    predicts all of them at once, independently of each other given the tokens before.

    Positions are rotary: row and column on a grid, one number in a plain sequence. The tokens of a
    pyramid go scale after scale, coarse to fine; each has the place of its centre on the finest
    grid, and the learned vector of its scale. As in LlamaGen's code the condition has no angle: its
    queries and keys are zero, so every token attends to it with the score 0.

    Args:
        codebook_size: Of the quantizer, how many values an index can take.
        tokens: Of an image: a side, a shape such as (32,) or (16, 16), or a pyramid's `.grids`.
        code_shape: Of the quantizer, the shape of a token's indices.
        classes: How many there are; 1 for pictures without classes, all labelled 0.
        text: Instead of classes (length, channels) of the embeddings of a text.
        width: Channels within the transformer.
        depth: Blocks.
        heads: Heads of attention, each of a multiple of 4 channels.
        dropout: Rate after embeddings, attention and SwiGLU.
        drop_path: Rate of stochastic depth of the last block, growing from zero.
        class_drop: How often the class or the text is left out in training mode.
        checkpointing: Recomputes each block in the backward pass of a training step.

    Raises:
        ValueError: If a size is not positive, heads do not fit, or a rate is none.

    Examples:
        >>> model = AR(64, tokens=4, classes=10, width=32, depth=2, heads=2)
        >>> tokens, labels = torch.randint(64, (2, 4, 4)), torch.tensor([3, 7])
        >>> model.loss(model(tokens, labels), tokens).backward()
        >>> model.generate(labels, guidance=2.0, top_k=50).shape
        torch.Size([2, 4, 4])
    """

    def __init__(
        self,
        codebook_size: int,
        tokens: Tokens = 16,
        *,
        code_shape: Sequence[int] = (),
        classes: int = 1000,
        text: Sequence[int] | None = None,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        dropout: float = 0.1,
        drop_path: float = 0.0,
        class_drop: float = 0.1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(codebook_size, tokens, code_shape, class_drop)
        check_sizes(self, classes=classes, width=width, depth=depth, heads=heads)
        check_heads(self, width, heads)
        check_rates(self, dropout=dropout, drop_path=drop_path)
        if width // heads % 4:
            raise ValueError(
                f"AR needs heads of a multiple of 4 channels, two pairs that turn, got {heads} "
                f"heads of {width // heads}"
            )
        self.classes, self.width, self.depth, self.heads = classes, width, depth, heads
        self.drop_path, self.checkpointing = drop_path, checkpointing
        rows = self.heads_per_token * codebook_size
        self.condition = self._prefix(classes, text)
        self.embedding = nn.Embedding(rows, width)
        self.scale = nn.Embedding(len(self.grids), width) if self.grids else None
        self.dropout = nn.Dropout(dropout)
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(ARBlock(width, heads, dropout, rate) for rate in rates)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, rows, bias=False)
        self._start()

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON: `AR(**model.config())`."""
        prefix = self.condition
        text = [prefix.length, prefix.channels] if isinstance(prefix, Text) else None
        return super().config() | {
            "classes": self.classes,
            "text": text,
            "width": self.width,
            "depth": self.depth,
            "heads": self.heads,
            "dropout": self.dropout.p,
            "drop_path": self.drop_path,
            "class_drop": self.class_drop,
            "checkpointing": self.checkpointing,
        }

    def forward(
        self,
        tokens: Shaped[Tensor, "..."],
        labels: Shaped[Tensor, "..."],
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b t *code V"]:
        """The logits of each token, given those before it.

        Values are looked at on the CPU alone, where that does not wait for a device.

        Args:
            tokens: `(b, *tokens, *code_shape)`, or the first ones in a row, `(b, t, *code_shape)`.
            labels: `(b,)`, class ids in 0..classes - 1, or -1 for images of no class; or the
                embeddings of texts `(b, length, channels)`.
            generator: Draws which conditions are left out, on their device; torch's own by default.

        Returns:
            `(b, t, *code_shape, codebook_size)`; a softmax makes them probabilities.

        Raises:
            ValueError: If tokens or labels are of another shape, number or range.
        """
        flat, labels = self._checked(tokens, labels)
        prefix = self._condition(labels, self._dropped(labels, generator))
        x, scales = self._embedded(self.embedding, flat[:, :-1]), self._scales()
        if scales is not None:
            x = x + scales[: x.shape[1]]
        x = self.dropout(torch.cat([prefix, x], dim=1))
        turns = self._rotations(x)[:, : x.shape[1]]
        recompute = self.checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, turns, use_reentrant=False) if recompute else block(x, turns)
        return self._split(self.head(self.norm(x[:, self.condition.length - 1 :])))

    def loss(
        self, logits: Shaped[Tensor, "..."], tokens: Shaped[Tensor, "..."]
    ) -> Float[Tensor, ""]:
        """The mean cross entropy of all indices, in nats.

        Args:
            logits: From `forward`.
            tokens: What it was given.

        Raises:
            ValueError: If the two do not fit each other or the model.
        """
        return self._cross_entropy(logits, self._flat(tokens))

    @torch.no_grad()
    def generate(
        self,
        labels: Shaped[Tensor, "..."],
        *,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "b ..."]:
        """Samples the tokens of images, in eval mode, ready for `tokenizer.decode`.

        Keys and values of earlier tokens are kept, so each step computes one token alone. It reads
        tokens, so unlike `VAR` it needs no quantizer.

        Args:
            labels: As of `forward`, one an image.
            guidance: Of the condition against none, where 1 is none (LlamaGen: 1.5 to 4).
            temperature: What logits are divided by.
            top_k: Draws among so many most probable codes alone; with 1 the result is certain.
            top_p: Draws among the most probable codes of this share alone.
            generator: For the draws, on the labels' device; torch's own by default.

        Raises:
            ValueError: If labels or another argument are out of range.
        """
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        check_sampling(self, guidance=guidance, **options)
        weights = [guidance] * self.num_tokens
        return self._generate(labels, weights, generator=generator, **options)

    def _rotations(self, like: Tensor) -> Float[Tensor, "2 n c"]:
        """Of each position, the condition's first, which are turned by zero and so vanish."""
        axes = [axis.to(widen(like).dtype) for axis in self._places(like.device)]
        turns = rotations(axes, self.width // self.heads)
        return F.pad(turns, (0, 0, self.condition.length, 0))

    def _places(self, device: torch.device) -> list[Tensor]:
        """Of each token: its place in a row, or its row and column on the finest grid."""
        if len(self.token_shape) == 1 and not self.grids:
            return [torch.arange(self.num_tokens, device=device)]
        grids: Any = self.grids or (self.token_shape,)
        rows, columns = [], []
        for h, w in grids:
            row, column = (
                (torch.arange(n, device=device) + 0.5) * (finest / n) - 0.5
                for n, finest in zip((h, w), grids[-1], strict=True)
            )
            rows.append(row.repeat_interleave(w))
            columns.append(column.repeat(h))
        return [torch.cat(rows), torch.cat(columns)]

    def _scales(self) -> Float[Tensor, "n width"] | None:
        """Of each token the vector of its scale; None without a pyramid."""
        if self.scale is None:
            return None
        vectors = zip(self.scale.weight, self.grids, strict=True)
        return torch.cat([vector.expand(h * w, -1) for vector, (h, w) in vectors])

    def _labels(self, labels: Tensor, *, look: bool) -> Tensor:
        return self.condition.checked(self, labels, look=look)

    def _condition(self, labels: Tensor, dropped: Tensor | None) -> Float[Tensor, "b n width"]:
        return self.condition(labels, dropped)

    def _begin(self, condition: Tensor) -> _Kept:
        # nothing is predicted from the last token
        length = self.condition.length + self.num_tokens - 1
        caches = [Cache(length) for _ in self.blocks]
        return _Kept(condition, self._rotations(condition), self._scales(), caches)

    def _next(self, tokens: Int[Tensor, "b t P"], kept: _Kept) -> Float[Tensor, "b *code V"]:
        t = tokens.shape[1]
        x = self._embedded(self.embedding, tokens[:, -1:]) if t else kept.condition
        if t and kept.scales is not None:
            x = x + kept.scales[t - 1]
        start = kept.caches[0].filled
        turns = kept.turns[:, start : start + x.shape[1]]
        for block, cache in zip(self.blocks, kept.caches, strict=True):
            x = block(x, turns, cache)
        return self._split(self.head(self.norm(x[:, -1:])))[:, 0]

    def _prefix(self, classes: int, text: Sequence[int] | None) -> Classes | Text:
        if text is None:
            return Classes(classes, self.width)
        if len(text) != 2 or not all(type(size) is int and size > 0 for size in text):
            raise ValueError(
                f"AR needs `text` as (length, channels) of the embeddings of a text, got {text!r}"
            )
        return Text(text[0], text[1], self.width)

    def _start(self) -> None:
        """LlamaGen's start: normal weights, and a head of zeros, so that all codes are alike."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
        nn.init.zeros_(self.head.weight)


def ar_b(codebook_size: int = 16384, tokens: Tokens = 16, **options: Any) -> AR:
    """LlamaGen-B, 111 M parameters at 16384 codes; `options` are those of `AR`.

    Args:
        codebook_size: Of the quantizer.
        tokens: Of an image, as for `AR`.
        **options: As for `AR`.
    """
    return AR(codebook_size, tokens, width=768, depth=12, heads=12, **options)


def ar_l(codebook_size: int = 16384, tokens: Tokens = 16, **options: Any) -> AR:
    """LlamaGen-L, 343 M parameters at 16384 codes; `options` are those of `AR`.

    Args:
        codebook_size: Of the quantizer.
        tokens: Of an image, as for `AR`.
        **options: As for `AR`.
    """
    return AR(codebook_size, tokens, width=1024, depth=24, heads=16, **options)


def ar_xl(codebook_size: int = 16384, tokens: Tokens = 16, **options: Any) -> AR:
    """LlamaGen-XL, 775 M parameters at 16384 codes; `options` are those of `AR`.

    Args:
        codebook_size: Of the quantizer.
        tokens: Of an image, as for `AR`.
        **options: As for `AR`.
    """
    return AR(codebook_size, tokens, width=1280, depth=36, heads=20, **options)


def ar_xxl(codebook_size: int = 16384, tokens: Tokens = 16, **options: Any) -> AR:
    """LlamaGen-XXL, 1.4 B parameters at 16384 codes; `options` are those of `AR`.

    Args:
        codebook_size: Of the quantizer.
        tokens: Of an image, as for `AR`.
        **options: As for `AR`.
    """
    return AR(codebook_size, tokens, width=1536, depth=48, heads=24, **options)
