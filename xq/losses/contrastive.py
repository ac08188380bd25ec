"""How near features of a teacher and a student are: in contrast to other images, or by angle."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from xq.distributed import SharedGroup, gather_with_gradient, rank, sum_over_processes
from xq.losses.pairs import sum_of_pairs
from xq.precision import Float32, float32_island, widen

# CLIP's bound on what the learned temperature multiplies logits by
_LARGEST_SCALE = 100.0
# a direction of vectors below this length is rounding
_SHORTEST = 1e-12


def contrastive_loss(
    teacher: Shaped[Tensor, "..."],
    student: Shaped[Tensor, "..."],
    keep: Shaped[Tensor, "..."] | None = None,
    *,
    temperature: float | Float[Tensor, ""] = 0.07,
    normalize: bool = True,
    process_group: Any = None,
) -> Float[Tensor, ""]:
    """CLIP's symmetric cross-entropy over all processes' images (Radford et al. 2021, figure 3).

    The logits are the dot products of each image's teacher with each image's student, divided by
    the temperature. With several positions an image, each position is a contrast of its own over
    the images, and the loss is their mean. Memory is linear in the batch: logits that are
    many are made a block at a time, forward and once more backward. There are no second
    derivatives.

    Each process compares its own images with all, and the value is that of all of them. So the
    gradient on one process is that of the joint batch times the number of processes, of which
    data parallelism takes the mean.

    Args:
        teacher: Features (b, *positions, dim). Every process has equally many.
        student: The same shape.
        keep: Bools (b,): images that count, as query and as contrast; by default all.
        temperature: Divides the logits; CLIP's 0.07 by default.
        normalize: Whether vectors get length 1 first.
        process_group: The processes whose batches are one; all by default.

    Raises:
        ValueError: If shapes or dtypes do not fit, or the processes' batches differ in size.
    """
    _check_features("contrastive_loss", teacher, student, keep)
    with float32_island(teacher.device.type):
        teacher, student, kept = _prepared(teacher, student, keep)
        first = rank(process_group) * len(teacher)
        own = slice(first, first + len(teacher))
        if normalize:
            teacher, student = unit(teacher), unit(student)
        both = gather_with_gradient(torch.cat([teacher, student], dim=-1), process_group)
        all_kept = gather_with_gradient(kept.to(both.dtype), process_group) > 0
        both = both.transpose(0, 1) * temperature**-0.5
        teacher, student = both.chunk(2, dim=-1)
        total = sum_of_pairs(teacher, student, kept, all_kept, own)
        total = sum_over_processes(total, process_group)  # pyright: ignore[reportArgumentType]
        return total / (2 * len(both) * all_kept.sum().clamp(min=1))


def cosine_loss(
    teacher: Shaped[Tensor, "..."],
    student: Shaped[Tensor, "..."],
    keep: Shaped[Tensor, "..."] | None = None,
    *,
    process_group: Any = None,
) -> Float[Tensor, ""]:
    """One minus the cosine between teacher and student, the mean over positions and kept images.

    Compares as `contrastive_loss` does; processes may have batches of different sizes.

    Args:
        teacher: As there.
        student: As there.
        keep: As there.
        process_group: As there.
    """
    _check_features("cosine_loss", teacher, student, keep)
    with float32_island(teacher.device.type):
        teacher, student, kept = _prepared(teacher, student, keep)
        distances = 1 - (unit(teacher) * unit(student)).sum(-1).mean(-1)
        sums = torch.stack([distances.where(kept, 0).sum(), kept.sum().to(distances.dtype)])
        total, count = sum_over_processes(sums, process_group)
        return total / count.detach().clamp(min=1)


class ContrastiveLoss(Float32):
    """`contrastive_loss` with a temperature: fixed, learned, or set at each step.

    `loss.temperature = t` sets it, with a schedule such as `cooling_temperature` before each step.
    XQ-GAN's released models have `normalize=False, temperature=1.0`; its multi-scale binary ones
    normalize and cool from 1 to 0.01.

    Args:
        temperature: Where it starts; CLIP's 0.07 by default.
        learned: Whether its logarithm is a parameter; the logits are then multiplied by 100 at
            most, as in CLIP (section 2.5).
        normalize: Whether vectors get length 1 first.
        process_group: The processes whose batches are one; all by default.

    Raises:
        ValueError: If the temperature is not positive.

    Examples:
        >>> contrast = ContrastiveLoss(0.07, learned=True)
        >>> loss = contrast(torch.randn(8, 32), torch.randn(8, 32))
    """

    # the teacher is brought to the student's channels, as the paper does
    projects_student = False

    log_scale: Tensor

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learned: bool = False,
        normalize: bool = True,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        log_scale = torch.tensor(_log_scale(temperature))
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        self.learned, self.normalize = learned, normalize
        self._shared_group = SharedGroup(process_group)

    @property
    def temperature(self) -> float:
        """What divides the logits. Reading it waits for the device, setting it does not."""
        return 1 / self._scale().item()

    @temperature.setter
    def temperature(self, value: float) -> None:
        with torch.no_grad():
            self.log_scale.fill_(_log_scale(value))

    def _scale(self) -> Float[Tensor, ""]:
        log_scale = self.log_scale
        if self.learned:
            # the gradient passes the bound, so that the parameter finds its way back
            bounded = log_scale.clamp(max=math.log(_LARGEST_SCALE))
            log_scale = log_scale + (bounded - log_scale).detach()
        return log_scale.exp()

    def forward(
        self,
        teacher: Shaped[Tensor, "..."],
        student: Shaped[Tensor, "..."],
        keep: Shaped[Tensor, "..."] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of features (b, *positions, dim), as `contrastive_loss` takes them."""
        return contrastive_loss(
            teacher,
            student,
            keep,
            temperature=1 / self._scale(),
            normalize=self.normalize,
            process_group=self._shared_group.group,
        )

    def extra_repr(self) -> str:
        return f"learned={self.learned}, normalize={self.normalize}"


class CosineLoss(nn.Module):
    """`cosine_loss`: distillation without contrast, which needs no large batch.

    Args:
        process_group: The processes whose batches are one; all by default.
    """

    # the target stays as it is: a projector of the teacher could make all images alike
    projects_student = True

    def __init__(self, *, process_group: Any = None) -> None:
        super().__init__()
        self._shared_group = SharedGroup(process_group)

    def forward(
        self,
        teacher: Shaped[Tensor, "..."],
        student: Shaped[Tensor, "..."],
        keep: Shaped[Tensor, "..."] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of features (b, *positions, dim), as `cosine_loss` takes them."""
        return cosine_loss(teacher, student, keep, process_group=self._shared_group.group)


def cooling_temperature(progress: float, *, start: float = 1.0, end: float = 0.01) -> float:
    """XQ-GAN's schedule: the inverse of the temperature rises linearly, then stays.

    Args:
        progress: Share of the cooling that is over, 1 or more at its end (there, 200 epochs).
        start: The temperature at 0.
        end: That from 1 on.

    Raises:
        ValueError: If a temperature is not positive, or progress is negative.
    """
    if not (start > 0 and end > 0 and progress >= 0):
        raise ValueError(
            "cooling_temperature needs positive temperatures and progress from 0 on, got "
            f"progress={progress}, start={start}, end={end}"
        )
    progress = min(progress, 1.0)
    return 1 / ((1 - progress) / start + progress / end)


def unit(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Vectors of length 1 in float32 or wider; those of length 0 stay, without a gradient."""
    x = widen(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.where(length > _SHORTEST, math.inf)


def _prepared(
    teacher: Tensor, student: Tensor, keep: Tensor | None
) -> tuple[Float[Tensor, "b p dim"], Float[Tensor, "b p dim"], Bool[Tensor, " b"]]:
    """Positions on one axis, one dtype; dropped images are zero, whatever they hold."""
    dtype = torch.promote_types(widen(teacher).dtype, widen(student).dtype)
    if keep is None:
        keep = torch.ones(len(teacher), dtype=torch.bool, device=teacher.device)
    found = []
    for x in (teacher, student):
        x = x.to(dtype).reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
        found.append(x.where(keep[:, None, None], 0))
    return found[0], found[1], keep


def _check_features(name: str, teacher: Tensor, student: Tensor, keep: Tensor | None) -> None:
    shapes = f"teacher {tuple(teacher.shape)} and student {tuple(student.shape)}"
    if not (teacher.is_floating_point() and student.is_floating_point()):
        raise ValueError(f"{name} expects floats, got {teacher.dtype} and {student.dtype}")
    if teacher.ndim < 2 or teacher.shape != student.shape:
        raise ValueError(
            f"{name} expects teacher and student of one shape (b, *positions, dim), got {shapes}"
        )
    if keep is not None and (keep.dtype != torch.bool or keep.shape != teacher.shape[:1]):
        raise ValueError(
            f"{name} expects keep as {len(teacher)} bools, one an image, got {keep.dtype} of shape "
            f"{tuple(keep.shape)}"
        )


def _log_scale(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise ValueError(f"ContrastiveLoss needs a positive temperature, got {temperature}")
    return -math.log(temperature)
