"""LeCam regularization, which keeps a discriminator's logits near those of the other kind."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from xq.distributed import all_reduce_sum_
from xq.learning import is_learning
from xq.losses.logits import check_logits
from xq.precision import Float32, widen


def lecam(
    real: Float[Tensor, "..."],
    fake: Float[Tensor, "..."],
    real_mean: Float[Tensor, ""],
    fake_mean: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """How far logits lead away from the running means (Tseng et al. 2021, section 3).

    Squared, and of one side alone as in the authors' code: real logits above the mean of the
    generated, generated ones below the mean of the real.

    Args:
        real: Logits of real images.
        fake: Logits of generated images.
        real_mean: Running mean of the logits of real images.
        fake_mean: Running mean of those of generated images.
    """
    above, below = F.relu(real - fake_mean), F.relu(real_mean - fake)
    return above.square().mean() + below.square().mean()


class LeCam(Float32):
    """`lecam` with running means of the logits of real and generated images.

    For the discriminator's loss; XQ-GAN weighs it by 0.001. The means are those of all processes,
    take one reduction a call and are saved. As in XQ-GAN they start at zero and move before they
    are used. They move in training mode with gradients alone, not twice where activations are
    recomputed, and leave out a batch whose mean is not finite. In float32 whatever the logits are.

    Args:
        decay: What is kept of the means at each call, in [0, 1).

    Raises:
        ValueError: If `decay` lies outside its range.

    Examples:
        >>> penalty = LeCam()
        >>> real, fake = torch.randn(8), torch.randn(8)
        >>> loss = discriminator_loss(real, fake) + 0.001 * penalty(real, fake)
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"LeCam needs a decay in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def reset_parameters(self) -> None:
        """Forgets the means."""
        self.real_mean.zero_()
        self.fake_mean.zero_()

    def forward(
        self, real: Shaped[Tensor, "..."], fake: Shaped[Tensor, "..."]
    ) -> Float[Tensor, ""]:
        """The penalty, after the means have moved.

        Args:
            real: Logits of real images, of any shape.
            fake: Those of generated images.

        Raises:
            ValueError: If the logits are none.
        """
        check_logits("LeCam", real=real, fake=fake)
        real, fake = widen(real), widen(fake)
        if is_learning(self):
            self._update(real, fake)
        return lecam(real, fake, self.real_mean, self.fake_mean)

    @torch.no_grad()
    def _update(self, real: Float[Tensor, "..."], fake: Float[Tensor, "..."]) -> None:
        sums = torch.stack([real.sum(), fake.sum()])
        counts = torch.stack([sums.new_full((), x.numel()) for x in (real, fake)])
        # processes may have batches of unlike sizes
        all_reduce_sum_([sums, counts])
        for running, mean in zip((self.real_mean, self.fake_mean), sums / counts, strict=True):
            moved = running.lerp(mean.to(running), 1 - self.decay)
            # one overflow of mixed precision would stay in the means
            running.copy_(torch.where(moved.isfinite(), moved, running))

    def config(self) -> dict[str, float]:
        """The constructor's arguments, ready for JSON."""
        return {"decay": self.decay}

    def extra_repr(self) -> str:
        return f"decay={self.decay}"
