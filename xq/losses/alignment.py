"""One branch of a tokenizer learns what a frozen teacher sees (XQ-GAN, section 5)."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.losses.contrastive import ContrastiveLoss, CosineLoss
from xq.losses.teachers import Features, Teacher
from xq.precision import Float32, float32_island, widen

LEVELS = ("token", "patch")


class FeatureAlignment(Float32):
    """How far a branch's `z` is from what a frozen teacher sees in the same images.

    One instance serves one branch, so "DINO on one branch, SAM on the other" (table 3) is two of
    them. Of a product, `quantizer.split(quantized.z)` gives the branches:

        semantic = FeatureAlignment(TimmTeacher("vit_base_patch14_dinov2"), dim=32)
        detail = FeatureAlignment(TimmTeacher("samvit_base_patch16"), dim=32, level="patch")
        first, last = quantizer.split(quantized.z)
        loss = semantic(image, last, keep) + detail(image, first, keep)

    Several branches that learn from one teacher share it and its forward pass:
    `features = teacher(image)`, then `alignment(features, z)` for each.

    At level "token" the teacher's pooled vector is compared with the mean of `z` over all places.
    At level "patch" both grids are averaged to the coarser one, and each place is a contrast of its
    own over the images.

    The contrast is that of the paper: a projector brings the teacher to the channels of `z`, and
    takes part in training. `CosineLoss` has it bring `z` to the teacher's channels instead. Its
    parameters, and a learned temperature, go to the optimizer; the state holds the projector
    and the temperature, not the teacher.

    Args:
        teacher: A `Teacher`, such as `TimmTeacher` or `CLIPTeacher`.
        dim: Channels of `z`.
        level: "token" or "patch".
        loss: A `ContrastiveLoss`, by default with CLIP's temperature, or a `CosineLoss`.
        projector: Maps the last axis. By default a linear map; the tokenizer's own projection to
            `dim` channels shares it, as XQ-GAN does, and is then in the state of both: build the
            optimizer from `nn.ModuleList([tokenizer, alignment]).parameters()`.

    Raises:
        ValueError: If `level` or `dim` is neither of these.

    Examples:
        >>> import timm
        >>> teacher = TimmTeacher(timm.create_model("test_vit"))  # or "vit_base_patch14_dinov2"
        >>> semantic, quantizer = FeatureAlignment(teacher, dim=8), ProductQuantizer(BSQ(8), P=2)
        >>> z = quantizer(torch.randn(4, 4, 4, 16)).z
        >>> loss = semantic(torch.rand(4, 3, 64, 64) * 2 - 1, quantizer.split(z)[-1])
    """

    def __init__(
        self,
        teacher: Teacher,
        dim: int,
        *,
        level: str = "token",
        loss: ContrastiveLoss | CosineLoss | None = None,
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if level not in LEVELS:
            raise ValueError(f"FeatureAlignment has the levels {', '.join(LEVELS)}, got {level!r}")
        if dim < 1:
            raise ValueError(f"FeatureAlignment needs a positive dim, got {dim}")
        if not isinstance(teacher, Teacher):
            raise ValueError(
                f"FeatureAlignment needs a Teacher, got {type(teacher).__name__}; "
                "TimmTeacher(...) and CLIPTeacher(...) make one of a name"
            )
        self.teacher, self.dim, self.level = teacher, dim, level
        self.loss = ContrastiveLoss() if loss is None else loss
        inputs, outputs = teacher.token_dim if level == "token" else teacher.patch_dim, dim
        if self.loss.projects_student:
            inputs, outputs = outputs, inputs
        self.projector = nn.Linear(inputs, outputs) if projector is None else projector

    def forward(
        self,
        image: Shaped[Tensor, "..."] | Features,
        z: Shaped[Tensor, "..."],
        keep: Shaped[Tensor, "..."] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss over the images of all processes, each of which must call it.

        Args:
            image: Images (b, 3, h, w) in -1..1, or what `teacher(image)` gave.
            z: What the branch made of them (b, *places, dim), channels last, with its gradient;
                (b, h, w, dim) for level "patch".
            keep: Bools (b,): images that count, such as those without quantizer dropout.

        Raises:
            ValueError: If shapes, dtypes or the range do not fit.
        """
        features = image if isinstance(image, Features) else self.teacher(image)
        self._check(features, z)
        with float32_island(z.device.type):
            z = widen(z)
            if self.level == "token":
                target, z = widen(features.token), z.reshape(len(z), -1, self.dim).mean(1)
            else:
                target, z = _on_one_grid(widen(features.patches), z)
            if self.loss.projects_student:
                z = self._projected(z, target.shape[-1])
            else:
                target = self._projected(target, self.dim)
            return self.loss(target, z, keep)

    def _projected(self, x: Float[Tensor, "*batch inner"], dim: int) -> Float[Tensor, "*batch dim"]:
        # a shared one may belong to a model in half precision
        weight = next(self.projector.parameters(), x)
        found = widen(self.projector(x.to(weight.dtype)))
        if found.shape != (*x.shape[:-1], dim):
            raise ValueError(
                f"FeatureAlignment needs a projector of the last axis from {x.shape[-1]} to {dim} "
                f"channels, got {tuple(found.shape)} from {tuple(x.shape)}"
            )
        return found

    def _check(self, features: Features, z: Tensor) -> None:
        shape = tuple(z.shape)
        if not z.is_floating_point():
            raise ValueError(f"FeatureAlignment expects z of floats, got {z.dtype}")
        if z.ndim < 2 or shape[-1] != self.dim:
            hint = "; move the channels with z.movedim(1, -1)" if self.dim in shape[1:2] else ""
            raise ValueError(
                f"FeatureAlignment expects z with {self.dim} channels in the last axis, "
                f"got {shape}{hint}"
            )
        if self.level == "patch" and z.ndim != 4:
            raise ValueError(
                f'FeatureAlignment with level="patch" expects z (b, h, w, {self.dim}), got {shape}'
            )
        if len(features.token) != len(z):
            raise ValueError(
                f"FeatureAlignment got {len(features.token)} images and z of {len(z)}; they must "
                "be of the same images, in one order"
            )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, level={self.level!r}"


def _on_one_grid(
    target: Float[Tensor, "b h w inner"], z: Float[Tensor, "b H W dim"]
) -> tuple[Float[Tensor, "b y x inner"], Float[Tensor, "b y x dim"]]:
    """Both averaged over places to the coarser of their grids, axis by axis."""
    size = min(target.shape[1], z.shape[1]), min(target.shape[2], z.shape[2])
    return _pooled(target, size), _pooled(z, size)


def _pooled(x: Float[Tensor, "b h w c"], size: tuple[int, int]) -> Float[Tensor, "b y x c"]:
    if x.shape[1:3] == size:
        return x
    x = F.adaptive_avg_pool2d(rearrange(x, "b h w c -> b c h w"), size)
    return rearrange(x, "b c h w -> b h w c")
