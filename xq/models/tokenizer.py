"""Tokenizer: encoder, quantizer, decoder."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from xq.config import describe
from xq.pretrained import Pretrained
from xq.quantizers import Quantized, Quantizer, Wrapper
from xq.quantizers.base import Depth, ScalesLike
from xq.quantizers.sharing import sharing


class Reconstruction(NamedTuple):
    """An image back from its tokens, and what the quantizer said."""

    image: Float[Tensor, "b c h w"]
    quantized: Quantized


class Tokenizer(Pretrained):
    """Images to tokens and back.

    Args:
        encoder: Maps images to vectors of `quantizer.dim` channels, channel-last (or whatever
            layout a wrapper around the quantizer takes).
        quantizer: Any quantizer or wrapper.
        decoder: Maps vectors of that layout to images.
    """

    def __init__(
        self, encoder: nn.Module, quantizer: Quantizer | Wrapper, decoder: nn.Module
    ) -> None:
        super().__init__()
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder

    def forward(self, image: Float[Tensor, "b c h w"], depth: Depth = None) -> Reconstruction:
        """Reconstructs images.

        Args:
            image: As the encoder takes them, usually in [-1, 1].
            depth: See `Quantizer.forward`.
        """
        quantized = self.quantizer(self.encoder(image), depth)
        return Reconstruction(self.decoder(quantized.z), quantized)

    @torch.no_grad()
    def encode(self, image: Float[Tensor, "b c h w"]) -> Int[Tensor, "..."]:
        """The tokens of images."""
        return self.quantizer.encode(self.encoder(image))

    def decode(self, indices: Shaped[Tensor, "..."]) -> Float[Tensor, "b c h w"]:
        """Images from tokens; leading steps or scales alone give a coarser one."""
        return self.decoder(self._as_decoder(self.quantizer.decode(indices)))

    def partials(self, indices: Shaped[Tensor, "..."]) -> Iterator[Float[Tensor, "b c h w"]]:
        """Images after each step or scale, coarse to fine."""
        for z in self.quantizer.partials(indices):
            yield self.decoder(self._as_decoder(z))

    def _as_decoder(self, z: Tensor) -> Tensor:
        # quantizers decode in float32, the decoder may be narrower
        weight = next((p for p in self.decoder.parameters() if p.is_floating_point()), z)
        return z.to(weight.dtype)

    def with_scales(self, scales: ScalesLike) -> "Tokenizer":
        """The same modules, shared, with the quantizer at another resolution."""
        return sharing(self, quantizer=self.quantizer.with_scales(scales))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON."""
        return describe(
            {"encoder": self.encoder, "quantizer": self.quantizer, "decoder": self.decoder}
        )
