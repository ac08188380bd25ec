"""Linear encoder and decoder of image patches, their principal-component start, and sums of parts.

A linear path that starts at the principal components reconstructs well before the first training
step; a convolutional network beside it, in a `Sum`, then learns what the linear path misses.
"""

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.models.cnn_blocks import check_images, check_sizes, check_tokens


class LinearEncoder(nn.Module):
    """Images to a grid of tokens, each a linear map of its own `patch` x `patch` pixels.

    The patch embedding of ViT (Dosovitskiy et al. 2021, section 3.1), without positions.

    Args:
        dim: Channels of a token.
        patch: Side of a patch.
        image_channels: Channels of the images.

    Raises:
        ValueError: If a size is not a positive integer.
    """

    def __init__(self, dim: int, patch: int = 8, *, image_channels: int = 3) -> None:
        super().__init__()
        check_sizes(self, dim=dim, patch=patch, image_channels=image_channels)
        self.dim, self.patch, self.image_channels = dim, patch, image_channels
        self.linear = nn.Linear(image_channels * patch**2, dim)

    @property
    def stride(self) -> int:
        """Side of the square of pixels that becomes one token."""
        return self.patch

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON: `LinearEncoder(**encoder.config())`."""
        return {"dim": self.dim, "patch": self.patch, "image_channels": self.image_channels}

    def patches(self, images: Shaped[Tensor, "..."]) -> Float[Tensor, "b h w p"]:
        """Cuts images into the patches that the linear map sees, flattened channels first.

        Raises:
            ValueError: If the images are not channel-first, not floating-point or of another size.
        """
        check_images(self, images, self.image_channels, self.patch)
        return F.pixel_unshuffle(images, self.patch).permute(0, 2, 3, 1)

    def forward(self, images: Shaped[Tensor, "..."]) -> Float[Tensor, "b h w dim"]:
        """Encodes images `(b, image_channels, H, W)` in [-1, 1]; `patch` divides `H` and `W`.

        Raises:
            ValueError: If the images are not channel-first, not floating-point or of another size.
        """
        return self.linear(self.patches(images))


class LinearDecoder(nn.Module):
    """A grid of tokens to images, each token linearly to its own `patch` x `patch` pixels.

    Args:
        dim: Channels of a token.
        patch: Side of a patch.
        image_channels: Channels of the images.

    Raises:
        ValueError: If a size is not a positive integer.
    """

    def __init__(self, dim: int, patch: int = 8, *, image_channels: int = 3) -> None:
        super().__init__()
        check_sizes(self, dim=dim, patch=patch, image_channels=image_channels)
        self.dim, self.patch, self.image_channels = dim, patch, image_channels
        self.linear = nn.Linear(dim, image_channels * patch**2)

    @property
    def stride(self) -> int:
        """Side of the square of pixels that one token becomes."""
        return self.patch

    @property
    def last_layer(self) -> Tensor:
        """The linear map's weight, where adaptive GAN weights compare gradients."""
        return self.linear.weight

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON: `LinearDecoder(**decoder.config())`."""
        return {"dim": self.dim, "patch": self.patch, "image_channels": self.image_channels}

    def forward(self, tokens: Shaped[Tensor, "..."]) -> Float[Tensor, "b image_channels H W"]:
        """Decodes tokens `(b, h, w, dim)`, of any grid.

        Raises:
            ValueError: If the tokens are not a channel-last grid of `dim` channels.
        """
        check_tokens(self, tokens, self.dim)
        return F.pixel_shuffle(self.linear(tokens).permute(0, 3, 1, 2), self.patch)


@torch.no_grad()
def fit_pca_(encoder: LinearEncoder, decoder: LinearDecoder, images: Shaped[Tensor, "..."]) -> None:
    """Sets encoder and decoder, in place, to the principal components of the images' patches.

    Token channel 0 then has the largest variance, and no linear pair of that `dim` reconstructs
    these patches with a smaller squared error. The mean patch is in the biases, so that tokens are
    centred. A component's sign is the one that makes its largest weight positive.

    Args:
        encoder: Its weight becomes the components.
        decoder: Its weight becomes their transpose; sizes as the encoder's.
        images: As many as hold `dim` patches, better some thousands.

    Raises:
        ValueError: If encoder and decoder differ in size, `dim` exceeds the numbers in a patch,
            there are fewer patches than `dim`, or the images are not finite.

    Examples:
        >>> encoder, decoder = LinearEncoder(16, patch=4), LinearDecoder(16, patch=4)
        >>> images = torch.rand(8, 3, 32, 32) * 2 - 1
        >>> fit_pca_(encoder, decoder, images)
        >>> bool(F.mse_loss(decoder(encoder(images)), images) < images.square().mean())
        True
    """
    if encoder.config() != decoder.config():
        raise ValueError(
            "fit_pca_ needs an encoder and a decoder of the same sizes, "
            f"got {encoder.config()} and {decoder.config()}"
        )
    # float64 on the CPU: the covariance squares the condition number, and not every device has it
    patches = encoder.patches(images).flatten(0, 2).cpu().double()
    count, size = patches.shape
    if encoder.dim > size:
        raise ValueError(
            f"fit_pca_ finds at most {size} components in patches of {encoder.image_channels} x "
            f"{encoder.patch} x {encoder.patch} numbers, got dim {encoder.dim}; lower `dim` or "
            "raise `patch`"
        )
    if count < encoder.dim:
        raise ValueError(
            f"fit_pca_ needs at least as many patches as dim {encoder.dim}, got {count} in images "
            f"of shape {tuple(images.shape)}; give more images"
        )
    mean = patches.mean(0)
    if not mean.isfinite().all():
        raise ValueError("fit_pca_ needs finite images, got NaN or infinity in them")
    centred = patches - mean
    # eigenvalues come in ascending order
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, : encoder.dim].T
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * largest.sign()
    encoder.linear.weight.copy_(components)
    encoder.linear.bias.copy_(-components @ mean)
    decoder.linear.weight.copy_(components.T)
    decoder.linear.bias.copy_(mean)


class Sum(nn.Module):
    """The sum of several modules' outputs for the same input.

    `Sum(LinearEncoder(24), CNNEncoder(24, patch=8, ...).zero_output_())` starts as its linear part
    and lets the network refine it. The parts are in `parts` under their names, in a state dict too;
    parts given without a name are called "0", "1" and so on.

    Args:
        modules: Parts without a name.
        named: Parts with a name, as in `Sum(linear=..., cnn=...)`.

    Raises:
        ValueError: If there is no part.
    """

    def __init__(self, *modules: nn.Module, **named: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({str(i): module for i, module in enumerate(modules)} | named)
        if not self.parts:
            raise ValueError("Sum needs at least one module, got none; give its parts as arguments")

    def config(self) -> dict[str, nn.Module]:
        """The parts by name, which are the constructor's arguments: `Sum(**parts.config())`."""
        return dict(self.parts.items())

    @property
    def stride(self) -> int:
        """That of the first part that has one, since all give the same grid."""
        for part in self.parts.values():
            stride: Any = getattr(part, "stride", None)
            if stride is not None:
                return stride
        raise AttributeError("no part of this Sum has a stride")

    def forward(self, x: Float[Tensor, "*input"]) -> Float[Tensor, "*output"]:
        """Adds up the parts' outputs.

        Raises:
            ValueError: If the outputs' shapes differ, which addition might broadcast in silence.
        """
        outputs = {name: part(x) for name, part in self.parts.items()}
        shapes = {name: tuple(output.shape) for name, output in outputs.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(
                f"Sum needs outputs of one shape, got {shapes} from its parts; "
                "give them the same dim and stride"
            )
        return reduce(torch.add, outputs.values())
