"""Pretrained networks of other libraries: built by name, with a local file or a download."""

import difflib
import importlib
import os
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

PathLike = str | os.PathLike[str]

# what reading a broken file raises
_DAMAGED = (
    *(SafetensorError, EOFError, pickle.UnpicklingError, struct.error, OverflowError),
    *(AssertionError, AttributeError, RuntimeError, ValueError, LookupError, TypeError),
)
# what calling a constructor with an unknown argument says
_UNKNOWN_OPTION = "unexpected keyword argument"


def timm_model(
    owner: str,
    name: str,
    *,
    pretrained: bool = True,
    weights: PathLike | None = None,
    **options: Any,
) -> nn.Module:
    """A model of timm without its classifier.

    Position embeddings and patch kernels are resampled as timm does it where `options` change the
    size of images or patches. Files are read as tensors alone, nothing in them is executed.

    Args:
        owner: Whose error messages they are.
        name: The name in timm, such as "vit_small_patch16_224.dino".
        pretrained: Whether timm's own weights are downloaded, once, where no file is given.
        weights: A local file, `.safetensors` or a state dict, with or without the classifier, in
            timm's names or those of the networks' authors.
        options: For `timm.create_model`, such as `img_size`.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If timm is missing.
        OSError: If the download fails.
        ValueError: If timm has no such model, it does not take the options, or the file does not
            fit it.
    """
    timm, config = imported("timm", owner, "timm"), timm_config(owner, name)
    if weights is None:
        with _takes(owner, name, options), downloads(owner, name):
            return timm.create_model(name, pretrained, num_classes=0, **options)
    with reads(owner, name, weights):
        state = timm.models.load_state_dict(weights)
    # timm is strict only where the number of classes is that of the file
    heads = [config.classifier] if isinstance(config.classifier, str) else config.classifier
    rows = [len(state[f"{h}.weight"]) for h in heads or () if f"{h}.weight" in state]
    classes = rows[0] if rows else 0
    overlay = {"state_dict": state, "num_classes": classes}
    with _takes(owner, name, options), reads(owner, name, weights):
        model = timm.create_model(
            name, True, pretrained_cfg_overlay=overlay, num_classes=classes, **options
        )
    if classes:
        model.reset_classifier(0)
    return model


def timm_config(owner: str, name: str) -> Any:
    """What timm knows of a model, such as `input_size` and `fixed_input_size`.

    Raises:
        ImportError: If timm is missing.
        ValueError: If it has no such model.
    """
    timm = imported("timm", owner, "timm")
    # both lists: the latter has the tags behind the names' dots
    check_name(owner, "timm", name, timm.list_models() + timm.list_pretrained())
    return timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()


def imported(module: str, owner: str, package: str) -> Any:
    """A module of the extra "vision".

    Raises:
        ImportError: If it is missing; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{owner} needs {package}: pip install "xq[vision]"') from error


def check_name(owner: str, library: str, name: str, names: list[str]) -> None:
    """Refuses a name that is not among those of a library.

    Raises:
        ValueError: If it is not; the message has those that are near.
    """
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names)) or "none is near"
        raise ValueError(
            f"{owner} knows no model {name!r}: {library}.list_models() lists them ({near})"
        )


@contextmanager
def downloads(owner: str, name: str) -> Iterator[None]:
    """Says which argument takes a local file where a download within it fails.

    Raises:
        OSError: If it does.
    """
    try:
        yield
    # without a network; in timm also where there is nothing to download
    except (OSError, RuntimeError) as error:
        reason = str(error).rstrip(".")
        raise OSError(
            f"{owner} has no weights of {name}, which cannot be downloaded ({reason}); pass "
            'weights=, a local file (.safetensors or .pth; pip install "xq[vision]" has what '
            "reads it)"
        ) from error


@contextmanager
def reads(owner: str, name: str, weights: PathLike, hint: str = "") -> Iterator[None]:
    """Names the file that is read within it, should it be missing or damaged.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or is not that of the model.
    """
    if not Path(weights).is_file():
        raise FileNotFoundError(f"{owner} finds no file weights={str(weights)!r}{hint}")
    try:
        yield
    except _DAMAGED as error:
        # which is not the fault of the file
        if isinstance(error, TypeError) and _UNKNOWN_OPTION in str(error):
            raise
        # torch advises to trust the file, which nobody can do here
        reason = str(error).partition("In PyTorch 2.6")[0][:300]
        raise ValueError(
            f"{owner} cannot use weights={str(weights)!r}, which is damaged or no state dict of "
            f"{name}: {reason}"
        ) from error


@contextmanager
def _takes(owner: str, name: str, options: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        unknown = [option for option in options if f"'{option}'" in str(error)]
        if not (unknown and _UNKNOWN_OPTION in str(error)):
            raise
        given = ", ".join(f"{option}={options[option]}" for option in unknown)
        raise ValueError(f"{owner}: timm's {name} does not take {given}") from error
