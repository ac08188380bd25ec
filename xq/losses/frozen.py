"""Pretrained networks that losses look through: they move, but never learn and are never saved."""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

PathLike = str | os.PathLike[str]


class Frozen(nn.Module):
    """A module as a constant: its weights are buffers outside the saved state.

    So `.to()` moves them, while no optimizer, no `requires_grad_(True)`, no gradient reduction and
    no checkpoint finds them. Evaluation mode is kept whatever `.train()` says. Gradients pass
    through it to its input.

    Args:
        module: What to freeze; it is taken over, parameters and all.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.eval()
        for part in self.module.modules():
            tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
            for name, tensor in tensors:
                delattr(part, name)
                part.register_buffer(name, tensor.detach(), persistent=False)
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                # or its loading would look for the number of batches
                part.track_running_stats = False

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def timm_vit(owner: str, name: str, weights: PathLike | None, image_size: int) -> nn.Module:
    """A timm ViT without a head, for images of `image_size`, with its weights.

    Position embeddings and patch kernels are resampled as timm does it. Files are read as tensors
    alone, nothing in them is executed.

    Args:
        owner: Whose error messages they are.
        name: The name in timm, such as "vit_small_patch16_224.dino".
        weights: A local file, safetensors or a state dict, in timm's names or those of the
            networks' authors; by default timm's own, downloaded once.
        image_size: Height and width of its input.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If timm is missing.
        OSError: If the download fails.
        ValueError: If timm has no such ViT, or the file does not fit it.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f'{owner} needs timm: pip install "xq[vision]"') from error
    if not timm.is_model(name):
        raise ValueError(f"{owner}: timm {timm.__version__} has no model {name!r}")
    options: dict[str, Any] = {"num_classes": 0, "img_size": image_size}
    try:
        if weights is None:
            return _downloaded(owner, name, options)
        model = timm.create_model(name, pretrained=False, **options)
    except TypeError as error:
        raise ValueError(f"{owner} takes a ViT, and timm's {name} is none: {error}") from error
    _load(owner, model, name, Path(weights))
    return model


def _downloaded(owner: str, name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=True, **options)
    # timm raises the latter where there is nothing to download
    except (OSError, RuntimeError) as error:
        reason = str(error).rstrip(".")
        raise OSError(
            f"{owner} has no weights of {name}: {reason}. Pass weights=, a local file "
            '(.safetensors, or a state dict); what reads it comes with pip install "xq[vision]"'
        ) from error


def _load(owner: str, model: nn.Module, name: str, path: Path) -> None:
    from timm.models import load_state_dict

    if not path.is_file():
        raise FileNotFoundError(f"{owner} finds no file weights={path}")
    try:
        state: Any = load_state_dict(str(path), weights_only=True)
        # each family of timm has its own, which knows the names of the networks' authors
        adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        result = model.load_state_dict(adapt(state, model) if adapt else state, strict=False)
    except (SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{owner} cannot read weights={path} as those of {name}, a .safetensors file or a "
            f"plain state dict: {error}"
        ) from error
    unknown = [key for key in result.unexpected_keys if not key.startswith(("head", "fc_norm"))]
    if result.missing_keys or unknown:
        raise ValueError(
            f"{owner}: weights={path} is no file of {name}: it lacks {result.missing_keys[:3]} and "
            f"has {unknown[:3]} too much"
        )
