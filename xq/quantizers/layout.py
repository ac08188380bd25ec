"""ChannelFirst: quantizers in convolutional models."""

from jaxtyping import Float
from torch import Tensor

from xq.quantizers.wrapper import Wrapper


class ChannelFirst(Wrapper):
    """Takes and returns `(b, dim, *grid)`; indices keep their token shape `(b, *grid)`.

    Args:
        quantizer: A channel-last quantizer, or another wrapper.

    Examples:
        >>> quantizer = ChannelFirst(VQ(8, 64))
        >>> z, indices, _ = quantizer(torch.randn(2, 8, 16, 16))
        >>> z.shape, indices.shape
        (torch.Size([2, 8, 16, 16]), torch.Size([2, 16, 16]))
    """

    def enter(self, x: Float[Tensor, "b dim *grid"]) -> Float[Tensor, "b *grid dim"]:
        if x.ndim < 2 or x.shape[1] != self.dim:
            raise ValueError(
                f"ChannelFirst({type(self.quantizer).__name__}) expects {self.dim} channels in "
                f"axis 1, got shape {tuple(x.shape)}; leave the wrapper out for channel-last input"
            )
        return x.movedim(1, -1)

    def leave(self, z: Float[Tensor, "b *grid dim"]) -> Float[Tensor, "b dim *grid"]:
        return z.movedim(-1, 1)
