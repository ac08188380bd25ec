"""Frozen image models whose features a tokenizer is aligned to: DINOv2, CLIP, SAM, any of timm."""

import math
import re
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.backbones import PathLike, check_name, downloads, imported, reads, timm_config, timm_model
from xq.losses.frozen import freeze_
from xq.precision import eager, widen

# models made for larger images get as many pixels as a grid of 16 x 16 patches has
_LARGEST, _GRID = 256, 16
# resampling overshoots a little; beyond this the images have another range
_LIMIT = 1.5


class Features(NamedTuple):
    """What a teacher sees in images.

    Attributes:
        token: One vector an image, as the model pools it.
        patches: One vector a place, on a grid.
    """

    token: Float[Tensor, "b token_dim"]
    patches: Float[Tensor, "b h w patch_dim"]


class Teacher(nn.Module, ABC):
    """A frozen model: `teacher(image)` gives the `Features` of images in **-1..1**.

    It stays in eval mode whatever `.train()` says. Its weights are buffers outside the saved state:
    they move with `.to()`, no optimizer finds them, and no checkpoint carries them. There are no
    gradients. Autocast is followed; features are float32 or wider. (`DistributedDataParallel` sends
    buffers at each step unless told not to: `forward_sync_buffers=False`, in torch before 2.15
    `broadcast_buffers=False`.)

    A teacher of your own writes `extract`.

    Args:
        model: What `extract` uses; taken over and frozen.
        size: The side of the squares that images are resized to (bicubic, with antialiasing).
        mean: Of each colour in 0..1, as the model expects it.
        std: The same.

    Attributes:
        token_dim: Channels of `Features.token`.
        patch_dim: Channels of `Features.patches`.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, model: nn.Module, size: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        patch = _patch_size(model)
        if size % patch:
            raise ValueError(
                f"{type(self).__name__} needs a size that is a multiple of the patches of "
                f"{patch} x {patch}, got {size}; {max(size // patch, 1) * patch} is one"
            )
        self.model, self.size = model, size
        # of images in -1..1, which are twice as wide as those in 0..1
        colours = {"shift": [2 * m - 1 for m in mean], "scale": [2 * s for s in std]}
        like = next(model.parameters(), torch.zeros(()))
        for name, values in colours.items():
            values = torch.tensor(values).view(1, 3, 1, 1).to(like)
            self.register_buffer(name, values, persistent=False)
        freeze_(model)
        self.train()
        # one image tells the layout; its range is no check of those to come
        self._range_is_checked = True
        features = self(self.shift.new_zeros(1, 3, size, size))
        self.token_dim, self.patch_dim = features.token.shape[-1], features.patches.shape[-1]
        self._range_is_checked = False

    @abstractmethod
    def extract(self, image: Float[Tensor, "b 3 size size"]) -> Features:
        """The features of images that are already normalized."""

    @final
    def forward(self, image: Shaped[Tensor, "..."]) -> Features:
        """The features of images (b, 3, h, w) in -1..1.

        The first call checks the range (later ones do not, since that would make a GPU wait).

        Raises:
            ValueError: If dtype, shape or range do not fit.
        """
        self._check(image)
        with torch.no_grad():
            image = image.to(self.shift.dtype)
            if image.shape[2:] != (self.size, self.size):
                image = F.interpolate(
                    image, size=(self.size, self.size), mode="bicubic", antialias=True
                )
            features = self.extract((image - self.shift) / self.scale)
            return Features(*(widen(x) for x in features))

    def train(self, mode: bool = True) -> "Teacher":
        """Does nothing: a teacher stays in eval mode."""
        return super().train(False)

    def _check(self, image: Tensor) -> None:
        name = type(self).__name__
        if not image.is_floating_point():
            raise ValueError(
                f"{name} expects images of floats in -1..1, got {image.dtype}; "
                "for bytes pass x / 127.5 - 1"
            )
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise ValueError(
                f"{name} expects images of shape (b, 3, h, w), got {tuple(image.shape)}; "
                "a grey one goes in as x.expand(-1, 3, -1, -1)"
            )
        if not self._range_is_checked and eager(image):
            low, high = (float(v) for v in torch.aminmax(image.detach()))
            if not (low >= -_LIMIT and high <= _LIMIT):
                raise ValueError(
                    f"{name} expects images in -1..1, got values from {low:.4g} to {high:.4g}; "
                    "it brings them to the model's own mean and deviation"
                )
            self._range_is_checked = True

    def extra_repr(self) -> str:
        return f"size={self.size}"


@final
class TimmTeacher(Teacher):
    """A model of timm: DINOv2 is "vit_base_patch14_dinov2", SAM "samvit_base_patch16".

    The token is what the model pools: for DINOv2 its class token, for SAM and convolutional models
    a mean over places. The patches are the last feature map. Vision transformers are built for
    `size`, their position embeddings resampled, where weights of their own size are loaded.

    Args:
        model: A name, or a model made by `timm.create_model`, which brings its weights along.
        weights: A local file, `.safetensors` or `.pth`, with or without the classifier; by default
            timm's own, downloaded once.
        size: The side of the squares that images are resized to. By default the model's own, up to
            256; a larger one gives way to that of 16 x 16 patches (224 for DINOv2, 256 for SAM).

    Raises:
        FileNotFoundError: If the file is missing.
        ImportError: If timm is; `pip install "xq[vision]"` brings it.
        OSError: If the download fails.
        ValueError: If the name is unknown, the file does not fit, or the model has no grid.
    """

    def __init__(
        self,
        model: str | nn.Module,
        *,
        weights: PathLike | None = None,
        size: int | None = None,
    ) -> None:
        timm = imported("timm", "TimmTeacher", "timm")
        _check_size("TimmTeacher", size)
        if isinstance(model, str):
            config = timm_config("TimmTeacher", model)
            size = _usual_size(config.input_size[-1], model) if size is None else size
            # SAM's loader does not resample, its forward pass does
            fixed = config.fixed_input_size and not model.startswith("samvit")
            options: dict[str, Any] = {"img_size": size} if fixed else {}
            model = timm_model("TimmTeacher", model, weights=weights, **options)
        elif weights is not None:
            raise ValueError("TimmTeacher takes weights for a name; a module has its own")
        config = timm.data.resolve_model_data_config(model)
        own: int = _built_size(model) or config["input_size"][-1]
        super().__init__(model, own if size is None else size, config["mean"], config["std"])

    def extract(self, image: Float[Tensor, "b 3 size size"]) -> Features:
        model: Any = self.model
        found = model.forward_features(image)
        token = model.forward_head(found, pre_logits=True)
        if found.ndim == 3:
            found = found[:, getattr(model, "num_prefix_tokens", 0) :]
            side = math.isqrt(found.shape[1])
            if side**2 != found.shape[1]:
                raise ValueError(
                    f"TimmTeacher needs features on a square grid, got {found.shape[1]} tokens "
                    f"of {type(model).__name__}"
                )
            found = found.unflatten(1, (side, side))
        elif getattr(model, "output_fmt", "NCHW") != "NHWC":
            found = found.permute(0, 2, 3, 1)
        return Features(token, found)


@final
class CLIPTeacher(Teacher):
    """The image tower of a model of open_clip.

    The token is the embedding that CLIP compares with texts, the patches are the last layer's.

    Args:
        name: A name that `open_clip.list_models()` lists. OpenAI's weights need one that ends in
            "-quickgelu".
        weights: A local file of the whole model, `.safetensors` or `.pt`, or what open_clip calls
            a pretrained tag, downloaded once.
        size: The side of the squares that images are resized to; by default the model's own.

    Raises:
        FileNotFoundError: If there is neither such a file nor such a tag.
        ImportError: If open_clip is missing; `pip install "xq[vision]"` brings it.
        OSError: If the download fails.
        ValueError: If the name is unknown, or the file does not fit.
    """

    def __init__(
        self,
        name: str = "ViT-B-16-quickgelu",
        *,
        weights: PathLike = "openai",
        size: int | None = None,
    ) -> None:
        open_clip = imported("open_clip", "CLIPTeacher", "open_clip_torch")
        _check_size("CLIPTeacher", size)
        tower = _clip_tower(open_clip, name, weights, size)
        config = tower.preprocess_cfg
        # the tower's own, or what it was forced to
        own: int = config["size"] if isinstance(config["size"], int) else config["size"][-1]
        super().__init__(tower, own, config["mean"], config["std"])

    def extract(self, image: Float[Tensor, "b 3 size size"]) -> Features:
        model: Any = self.model
        found = model.forward_intermediates(image, indices=1, normalize_intermediates=True)
        patches = found["image_intermediates"][0].permute(0, 2, 3, 1)
        return Features(found["image_features"], patches)


def _clip_tower(open_clip: Any, name: str, weights: PathLike, size: int | None) -> Any:
    check_name("CLIPTeacher", "open_clip", name, open_clip.list_models())
    options: dict[str, Any] = {"force_image_size": size, "require_pretrained": True}
    tag = open_clip.get_pretrained_cfg(name, str(weights))
    if tag:
        # the tag knows which activation it was trained with, the name need not
        options["force_quick_gelu"] = tag.get("quick_gelu", False)
        with downloads("CLIPTeacher", name):
            return open_clip.create_model(name, str(weights), **options).visual
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
    with reads("CLIPTeacher", name, weights, f"; tags of {name}: {tags}"):
        return open_clip.create_model(name, str(weights), **options).visual


def _usual_size(own: int, name: str) -> int:
    """The model's own size, or that of a grid of 16 x 16 patches where it is a large one."""
    if own <= _LARGEST:
        return own
    patch = re.search(r"patch(\d+)", name)
    return _GRID * int(patch[1]) if patch else _LARGEST


def _patch_size(model: Any) -> int:
    """Of a vision transformer of timm or open_clip; 1 for other models."""
    size = getattr(getattr(model, "patch_embed", model), "patch_size", 1)
    return size if isinstance(size, int) else size[-1]


def _built_size(model: nn.Module) -> int | None:
    """The size that a vision transformer of timm was built for."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size[-1] if size else None


def _check_size(owner: str, size: int | None) -> None:
    if size is not None and size < 1:
        raise ValueError(f"{owner} needs a positive size, got {size}")
