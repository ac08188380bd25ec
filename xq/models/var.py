"""The next-scale generator of VAR, over the tokens of any pyramid."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xq.models.cnn_blocks import check_sizes
from xq.models.conditions import check_rates, checked_labels
from xq.models.next_scale import advance, pyramid_within
from xq.models.sampling import check_sampling, draw, guided
from xq.models.sizes import Size, checked_pair, plain_size
from xq.models.tokenizer import eval_mode
from xq.models.transformer import check_heads
from xq.models.var_blocks import Block, BlockCache, modulated, plain_norm
from xq.models.var_heads import make_head
from xq.precision import eager, widen
from xq.pretrained import Pretrained
from xq.quantizers import Quantizer, Wrapper

# of how much smaller the maps begin that AdaLN's parts and the logits come from
_SMALL_GATE, _SMALL_MODULATION, _SMALL_HEAD = 1e-5, 0.5, 0.02


class VAR(Pretrained):
    """A transformer that predicts all tokens of a scale from the scales before (Tian et al. 2024).

    Each token of a scale sees its own scale and the coarser ones. It is read from the sum of these,
    at the size of its scale (`teacher_forcing`), and predicts all indices of the token at its
    place: each branch of a product, as XQ-GAN does, or each step of a residual within a scale. They
    are predicted side by side, each from a linear map of its own.

    The class modulates each block (AdaLN, Peebles and Xie 2023), and stands for the first scale's
    input. In training mode it is left out at times, which guidance needs; the original does so in
    eval mode too.

    Args:
        dim: Channels of the quantizer.
        codebook_size: Values that each of its indices can take.
        grids: Its scales, sides or (height, width), coarse to fine; at least two.
        code_shape: The shape of one token's indices: `()`, `(P,)` for a product of P branches.
        classes: Of images; 1 for pictures without classes, all labelled 0.
        depth: Blocks.
        width: Channels of a token, by default 64 for each block.
        heads: Heads of attention, by default one for each block.
        head: "codes" predicts an index by a softmax over all its values; "bits" each of its bits by
            itself, for the signs of `LFQ` and `BSQ` (Han et al. 2025, Infinity, section 3.3), of
            which a softmax over 2^d codes does not fit.
        class_drop: How often the class is left out in training mode.
        drop_path: Rate of stochastic depth of the last block, growing from zero; by default 0.1
            for 24 blocks, less for fewer.
        checkpointing: Whether a training step recomputes blocks rather than keep what is in them.

    Raises:
        ValueError: If a size or a rate does not fit.

    Examples:
        >>> quantizer = ResidualQuantizer(VQ(8, 64), multiscale=(1, 2, 3))
        >>> tokens, labels = torch.randint(64, (2, 14)), torch.tensor([3, 7])
        >>> model = VAR.of(quantizer, classes=10, depth=2, width=32)
        >>> logits = model(teacher_forcing(quantizer, tokens), labels)
        >>> model.loss(logits, tokens).backward()
        >>> model.generate(quantizer, labels, guidance=2.5, top_k=50).shape
        torch.Size([2, 14])
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        grids: Sequence[Size],
        *,
        code_shape: Sequence[int] = (),
        classes: int = 1000,
        depth: int = 16,
        width: int | None = None,
        heads: int | None = None,
        head: str = "codes",
        class_drop: float = 0.1,
        drop_path: float | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(self, dim=dim, codebook_size=codebook_size, classes=classes, depth=depth)
        self.width = 64 * depth if width is None else width
        self.heads = depth if heads is None else heads
        self.drop_path = 0.1 * depth / 24 if drop_path is None else drop_path
        check_sizes(self, width=self.width, heads=self.heads)
        check_heads(self, self.width, self.heads)
        check_rates(self, class_drop=class_drop, drop_path=self.drop_path)
        self.dim, self.codebook_size, self.code_shape = dim, codebook_size, tuple(code_shape)
        self.grids = tuple(checked_pair(self, "grids", grid) for grid in grids)
        self.classes, self.depth, self.class_drop = classes, depth, class_drop
        self.head, self.checkpointing = head, checkpointing
        if not all(type(n) is int and n > 0 for n in self.code_shape):
            raise ValueError(
                f"VAR needs a code_shape of positive integers, got {self.code_shape}; it is "
                "quantizer.code_shape"
            )
        self._head = make_head(head, codebook_size, self.code_shape)
        # what is predicted at each place: numbers, and the values that each can take
        self.outcomes = self._head.outcomes
        self.ends = self._ends()
        self._build()
        self._reset()

    @classmethod
    def of(cls, quantizer: Any, **options: Any) -> "VAR":
        """A generator of the tokens of a quantizer, or of the tree within its wrappers.

        Args:
            quantizer: A pyramid or a product of pyramids.
            options: Further arguments of the constructor, from `classes` on.

        Raises:
            ValueError: If its steps are no scales, or an argument does not fit.
        """
        tree = pyramid_within("VAR", quantizer)
        model = cls(tree.dim, tree.codebook_size, tree.grids, code_shape=tree.code_shape, **options)
        model._fitting(tree)
        return model

    @property
    def num_tokens(self) -> int:
        """Of all scales."""
        return self.ends[-1]

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {
            "dim": self.dim,
            "codebook_size": self.codebook_size,
            "grids": [plain_size(grid) for grid in self.grids],
            "code_shape": list(self.code_shape),
            "classes": self.classes,
            "depth": self.depth,
            "width": self.width,
            "heads": self.heads,
            "head": self.head,
            "class_drop": self.class_drop,
            "drop_path": self.drop_path,
            "checkpointing": self.checkpointing,
        }

    def forward(
        self,
        inputs: Shaped[Tensor, "..."],
        labels: Shaped[Tensor, "..."],
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b t *outcomes"]:
        """The logits of all tokens, given those of the scales before each.

        Args:
            inputs: `(b, t - first, dim)` from `teacher_forcing`, of all scales or some leading
                ones.
            labels: `(b,)`, class ids in 0..classes - 1, or -1 for images of no class.
            generator: Draws which labels are left out, on their device; torch's own by default.
                What stochastic depth drops is torch's own, so that checkpointing repeats it.

        Returns:
            `(b, t, *code_shape, codebook_size)`; of the head "bits" `(b, t, *code_shape, bits, 2)`,
            bit i being the i-th lowest. A softmax over the last axis makes them probabilities.

        Raises:
            ValueError: If shapes or dtypes do not fit, or a label on the CPU is out of range.
        """
        labels = self._labels(labels, look=labels.device.type == "cpu")
        self._check_inputs(inputs, labels)
        if self.training and self.class_drop:
            drawn = torch.rand(len(labels), device=labels.device, generator=generator)
            labels = labels.masked_fill(drawn < self.class_drop, -1)
        embedded = self._embedded(labels)
        condition = F.silu(embedded)
        x = torch.cat([self._start(embedded), self._embed(inputs)], dim=1)
        x = x + self._places(0, x.shape[1])
        levels = self.levels[: x.shape[1]]
        visible = levels[:, None] >= levels
        recompute = self.checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                x = checkpoint(block, x, condition, visible, use_reentrant=False)
            else:
                x = block(x, condition, visible)
        return self._logits(x, condition)

    def loss(
        self, logits: Shaped[Tensor, "..."], tokens: Shaped[Tensor, "..."]
    ) -> Float[Tensor, ""]:
        """The cross-entropy of tokens, the mean over all places, branches and bits (Tian et al.).

        Args:
            logits: From `forward`.
            tokens: `(b, t, *code_shape)`, what they are to predict.

        Raises:
            ValueError: If the two do not fit each other, or tokens on the CPU are out of range.
        """
        self._check_tokens(logits, tokens)
        targets = self._head.targets(tokens.long())
        return F.cross_entropy(widen(logits).flatten(0, -2), targets.flatten())

    @torch.no_grad()
    def generate(
        self,
        quantizer: Quantizer | Wrapper,
        labels: Shaped[Tensor, "..."],
        *,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "b t *code"]:
        """Draws tokens for images of these classes, one scale after the other.

        What attention needs of the scales before is kept. In eval mode whatever mode the model is
        in. On a GPU it waits once, to look at the labels.

        Args:
            quantizer: The one whose tokens the model has learned. The codes of the scales so far
                are what the next scale is read from; `AR`, which reads the tokens themselves, needs
                none.
            labels: `(b,)`, class ids in 0..classes - 1, or -1 for images of no class.
            guidance: How much a class counts at the last scale, above 0; it grows from 1, which is
                no guidance, by equal steps. Without it the batch is half as large. VAR's cfg is
                `guidance - 1`.
            temperature: What logits are divided by.
            top_k: Draws of so many most probable values; all by default. 1 takes the best.
            top_p: Draws of the most probable values that make up this share; all by default.
            generator: On the model's device; torch's own by default.

        Returns:
            Tokens of all scales, for `quantizer.decode` and `Tokenizer.decode`.

        Raises:
            ValueError: If the quantizer is not alike the model's, or an argument is out of range.
        """
        tree = self._fitting(quantizer)
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        check_sampling(self, guidance=guidance, **options)
        labels = self._labels(labels, look=True)
        pairs = guidance != 1
        if pairs:
            labels = torch.cat([labels, torch.full_like(labels, -1)])
        with eval_mode(self):
            embedded = self._embedded(labels)
            condition = F.silu(embedded)
            caches = [BlockCache(self.num_tokens) for _ in self.blocks]
            x, tokens, z = self._start(embedded), [], None
            for k, end in enumerate(self.ends):
                x = x + self._places(end - x.shape[1], end)
                for block, cache in zip(self.blocks, caches, strict=True):
                    x = block(x, condition, cache=cache)
                logits = self._logits(x, condition)
                if pairs:
                    scale = 1 + (guidance - 1) * k / (len(self.ends) - 1)
                    logits = guided(*logits.chunk(2), scale)
                drawn = draw(logits, generator=generator, **options)
                tokens.append(self._head.tokens(drawn))
                inputs, z = advance(tree, tokens[-1], k, z)
                x = self._embed(inputs)
                x = torch.cat([x, x]) if pairs else x
        return torch.cat(tokens, dim=1)

    def _build(self) -> None:
        first, total = self.ends[0], self.ends[-1]
        self.class_embed = nn.Embedding(self.classes + 1, self.width)
        self.start = nn.Parameter(torch.empty(1, first, self.width))
        self.positions = nn.Parameter(torch.empty(1, total, self.width))
        self.level_embed = nn.Embedding(len(self.grids), self.width)
        self.embed = nn.Linear(self.dim, self.width)
        rates = [self.drop_path * i / max(self.depth - 1, 1) for i in range(self.depth)]
        self.blocks = nn.ModuleList(Block(self.width, self.heads, rate) for rate in rates)
        self.norm = plain_norm(self.width)
        self.modulation = nn.Linear(self.width, 2 * self.width)
        self.predict = nn.Linear(self.width, math.prod(self.outcomes))
        sizes = torch.tensor([h * w for h, w in self.grids])
        levels = torch.arange(len(self.grids)).repeat_interleave(sizes, output_size=total)
        self.register_buffer("levels", levels, persistent=False)
        self.levels: Tensor

    def _reset(self) -> None:
        """Weights of variance 1 / (3 width), those that end a block or a modulation smaller."""
        std = (3 * self.width) ** -0.5
        for tensor in (self.start, self.positions):
            nn.init.trunc_normal_(tensor, std=std)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(part.weight, std=std)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
        with torch.no_grad():
            self.modulation.weight.mul_(_SMALL_MODULATION)
            self.predict.weight.mul_(_SMALL_HEAD)
            for block in self.blocks:
                assert isinstance(block, Block)
                block.attention.projection.weight.mul_((2 * self.depth) ** -0.5)
                block.contract.weight.mul_((2 * self.depth) ** -0.5)
                block.modulation.weight[: 2 * self.width].mul_(_SMALL_GATE)
                block.modulation.weight[2 * self.width :].mul_(_SMALL_MODULATION)

    def _embedded(self, labels: Int[Tensor, " b"]) -> Float[Tensor, "b width"]:
        return self.class_embed(torch.where(labels < 0, self.classes, labels))

    def _start(self, embedded: Float[Tensor, "b width"]) -> Float[Tensor, "b first width"]:
        return embedded[:, None] + self.start

    def _embed(self, inputs: Float[Tensor, "b n dim"]) -> Float[Tensor, "b n width"]:
        return self.embed(inputs.to(self.embed.weight.dtype))

    def _places(self, start: int, end: int) -> Float[Tensor, "1 n width"]:
        """What tells places and scales apart."""
        return self.level_embed(self.levels[start:end]) + self.positions[:, start:end]

    def _logits(self, x: Float[Tensor, "b n width"], condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, None].chunk(2, dim=-1)
        logits = self.predict(modulated(self.norm(x), scale, shift))
        return logits.unflatten(-1, self.outcomes)

    def _ends(self) -> tuple[int, ...]:
        """How many tokens each scale and those before it have."""
        if len(self.grids) < 2:
            raise ValueError(
                f"VAR needs two scales or more, got {self.grids}; AR generates the tokens of one"
            )
        return tuple(accumulate(h * w for h, w in self.grids))

    def _fitting(self, quantizer: Any) -> Any:
        """The tree within a quantizer, if its tokens are like those of the model."""
        tree = pyramid_within("VAR", quantizer)
        for name in ("dim", "codebook_size", "code_shape", "grids"):
            have, want = getattr(tree, name), getattr(self, name)
            if have != want:
                raise ValueError(
                    f"VAR has learned tokens of a quantizer with {name}={want}, this one has "
                    f"{have}; give the quantizer that made them, or VAR.of(quantizer) a new model"
                )
        self._head.check(tree)
        return tree

    def _labels(self, labels: Tensor, *, look: bool) -> Int[Tensor, " b"]:
        return checked_labels(self, labels, self.classes, look=look)

    def _check_inputs(self, inputs: Tensor, labels: Tensor) -> None:
        shape, first = tuple(inputs.shape), self.ends[0]
        if not inputs.is_floating_point():
            raise ValueError(
                f"VAR expects the vectors of teacher_forcing, got {inputs.dtype}; "
                "pass teacher_forcing(quantizer, tokens) instead of tokens"
            )
        fits = inputs.ndim == 3 and shape[2] == self.dim and shape[1] + first in self.ends
        if not fits:
            raise ValueError(
                f"VAR expects inputs of shape (b, {self.num_tokens - first}, {self.dim}), or those "
                f"of some leading scales of {self.grids}, got {shape}; teacher_forcing with the "
                "quantizer of this model gives them"
            )
        if shape[0] != len(labels):
            raise ValueError(f"VAR got inputs of {shape[0]} images and {len(labels)} labels")

    def _check_tokens(self, logits: Tensor, tokens: Tensor) -> None:
        shape, places = tuple(tokens.shape), tuple(logits.shape[:2])
        if tuple(logits.shape[2:]) != self.outcomes:
            raise ValueError(
                f"VAR.loss expects logits (b, t, {', '.join(map(str, self.outcomes))}) of "
                f"forward, got {tuple(logits.shape)}"
            )
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"VAR.loss expects integer tokens, got {tokens.dtype}")
        if shape != (*places, *self.code_shape):
            raise ValueError(
                f"VAR.loss expects tokens of shape {(*places, *self.code_shape)} for these logits, "
                f"got {shape}; were they made by another tokenizer?"
            )
        # on a GPU this would wait; teacher_forcing has looked at them
        if tokens.device.type == "cpu" and eager(tokens) and tokens.numel():
            low, high = (int(v) for v in torch.aminmax(tokens))
            if low < 0 or high >= self.codebook_size:
                raise ValueError(
                    f"VAR.loss expects tokens in 0..{self.codebook_size - 1}, got {low}..{high}; "
                    "were they made by another tokenizer?"
                )
