"""Tokenizer: encoder, quantizer, decoder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from xq.config import describe
from xq.precision import eager
from xq.pretrained import Pretrained
from xq.quantizers import Quantized, Quantizer, Wrapper
from xq.quantizers.base import Depth, ScalesLike
from xq.quantizers.sharing import sharing


class Reconstruction(NamedTuple):
    """An image back from its tokens, and what the quantizer said.

    Attributes:
        image: As the decoder made it, not clamped.
        quantized: `z`, indices and losses.
    """

    image: Float[Tensor, "b c h w"]
    quantized: Quantized


class Tokenizer(Pretrained):
    """Images to tokens and back.

    Images are channel-first and usually in [-1, 1], as `xq.images` makes them of bytes and of
    pictures. They take the dtype of the encoder's weights, and decoded vectors that of the
    decoder's, so a `.bfloat16()` tokenizer is used as any other; the quantizer works in float32 all
    the same, within autocast too.

    Args:
        encoder: Maps images to vectors of `quantizer.dim` channels, channel-last (or whatever
            layout a wrapper around the quantizer takes).
        quantizer: Any quantizer or wrapper.
        decoder: Maps vectors of that layout to images.

    Examples:
        >>> small = {"channels": 8, "multipliers": (1, 2), "z_channels": 8, "patch": 4}
        >>> tokenizer = Tokenizer(CNNEncoder(8, **small), VQ(8, 64), CNNDecoder(8, **small)).eval()
        >>> image = torch.rand(2, 3, 32, 32) * 2 - 1
        >>> image_hat, quantized = tokenizer(image)
        >>> tokens = tokenizer.encode(image)
        >>> tokens.shape, tokenizer.decode(tokens).shape
        (torch.Size([2, 4, 4]), torch.Size([2, 3, 32, 32]))
    """

    def __init__(
        self, encoder: nn.Module, quantizer: Quantizer | Wrapper, decoder: nn.Module
    ) -> None:
        super().__init__()
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder

    def forward(self, image: Float[Tensor, "b c h w"], depth: Depth = None) -> Reconstruction:
        """Reconstructs images, with gradients, in the mode that the modules are in.

        Args:
            image: As the encoder takes them, usually in [-1, 1].
            depth: See `Quantizer.forward`.
        """
        quantized = self.quantizer(self._latent(image), depth)
        return Reconstruction(self._image(quantized.z), quantized)

    @torch.no_grad()
    def encode(self, image: Any, *, chunk: int | None = None) -> Int[Tensor, "..."]:
        """The tokens of images, in the mode that the modules are in: call `eval()` after training.

        Args:
            image: As the encoder takes them, usually in [-1, 1].
            chunk: How many images go through the encoder at a time; all by default.

        Raises:
            ValueError: If the encoder or the quantizer does not take images of this size or kind.
        """
        _check_tensor(image)
        return _in_chunks(lambda part: self.quantizer.encode(self._latent(part)), image, chunk)

    def decode(
        self, indices: Shaped[Tensor, "..."], *, chunk: int | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Images from tokens, not clamped; leading steps or scales alone give a coarser one.

        Args:
            indices: As `encode` returns them.
            chunk: How many images go through the decoder at a time; all by default.
        """
        return _in_chunks(lambda part: self._image(self.quantizer.decode(part)), indices, chunk)

    def partials(
        self, indices: Shaped[Tensor, "..."], *, chunk: int | None = None
    ) -> Iterator[Float[Tensor, "b c h w"]]:
        """Images after each step or scale, coarse to fine; the last one is `decode(indices)`.

        Args:
            indices: As `encode` returns them.
            chunk: How many images go through the decoder at a time; all by default.
        """
        for z in self.quantizer.partials(indices):
            yield _in_chunks(self._image, z, chunk)

    @torch.no_grad()
    def reconstruct(self, image: Any, *, chunk: int | None = None) -> Float[Tensor, "b c h w"]:
        """What is left of images after encoding and decoding, ready to be shown.

        In eval mode whatever mode the modules are in, without gradients, clamped to [-1, 1], in the
        dtype of the images. For training and losses call the tokenizer itself: it clamps nothing.

        Args:
            image: In [-1, 1], as `xq.images.to_images` makes them. `xq.images.pad_to_multiple`
                brings any size to a multiple of the encoder's stride.
            chunk: How many images are in the networks at a time; all by default.

        Raises:
            ValueError: If values lie outside [-1, 1], or the encoder or the quantizer does not take
                images of this size.
        """
        _check_tensor(image)
        _check_range(image)
        with eval_mode(self):
            made = _in_chunks(lambda part: self.decode(self.encode(part)), image, chunk)
        return made.clamp(-1, 1).to(image.dtype)

    def _latent(self, image: Tensor) -> Tensor:
        z = self.encoder(_like_weights(self.encoder, image))
        # a wrapper may have its own layout
        if isinstance(self.quantizer, Quantizer) and self.quantizer.scales and z.ndim == 4:
            _check_grid(image, tuple(z.shape[1:3]), self.quantizer.grids[-1])
        return z

    def _image(self, z: Tensor) -> Tensor:
        return self.decoder(_like_weights(self.decoder, z))

    def with_scales(self, scales: ScalesLike) -> "Tokenizer":
        """The same modules, shared, with the quantizer at another resolution."""
        return sharing(self, quantizer=self.quantizer.with_scales(scales))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON."""
        return describe(
            {"encoder": self.encoder, "quantizer": self.quantizer, "decoder": self.decoder}
        )


def _like_weights(module: nn.Module, x: Tensor) -> Tensor:
    """`x` in the dtype of the module's weights, which may be narrower; integers as they are."""
    if x.is_floating_point():
        # torch 2.6 cannot trace next() with a default
        for weight in module.parameters():
            if weight.is_floating_point():
                return x.to(weight.dtype)
    return x


def _in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, chunk: int | None) -> Tensor:
    """The function of `x`, of so many of the batch at a time."""
    if chunk is None:
        return function(x)
    if chunk < 1:
        raise ValueError(f"Tokenizer needs a chunk of 1 image or more, got chunk={chunk}")
    return torch.cat([function(part) for part in x.split(chunk)])


def _check_grid(image: Tensor, got: tuple[int, ...], grid: tuple[int, int]) -> None:
    """Refuses images whose tokens are not those of the finest scale, in terms of pixels."""
    if got == grid or 0 in got:
        return
    size = tuple(image.shape[2:])
    height, width = (side * want // have for side, want, have in zip(size, grid, got, strict=True))
    raise ValueError(
        f"Tokenizer has scales up to {grid[0]} x {grid[1]} tokens, those of images of {height} x "
        f"{width} pixels, got {size[0]} x {size[1]} pixels, which are {got[0]} x {got[1]} tokens; "
        "resize or crop the images, or give it that resolution: tokenizer.with_scales(...)"
    )


def _check_tensor(image: Any) -> None:
    if not isinstance(image, Tensor):
        raise ValueError(
            f"Tokenizer takes images as tensors (b, c, h, w), got {type(image).__name__}; "
            "xq.images.to_images makes them of pictures and arrays"
        )


def _check_range(image: Tensor) -> None:
    if eager(image) and image.numel():
        low, high = (float(v) for v in torch.aminmax(image))
        if low < -1 or high > 1:
            raise ValueError(
                f"Tokenizer.reconstruct takes images in [-1, 1], got values from {low:.4g} to "
                f"{high:.4g}; xq.images.to_images brings bytes there, and image.clamp(-1, 1) what "
                "resizing has overshot"
            )


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """In eval mode within it; each part gets its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
