"""Modules as folders: `config.json` and `model.safetensors`, on disk or on the Hugging Face Hub."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xq.config import build, describe

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
# what may name a repository: neither a path upwards, nor an absolute one, nor a deeper one
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)

PathLike = str | os.PathLike[str]
PretrainedT = TypeVar("PretrainedT", bound="Pretrained")
PretrainedT = TypeVar("PretrainedT", bound="Pretrained")


class Pretrained(nn.Module):
    """A module that is saved to a folder and read back; subclasses have a `config()`.

    Examples:
        >>> quantizer = ResidualQuantizer(VQ(8, 64), depth=2)
        >>> quantizer.save_pretrained("my_quantizer")
        >>> again = ResidualQuantizer.from_pretrained("my_quantizer")
    """

    def save_pretrained(self, folder: PathLike) -> None:
        """Writes `config.json` and `model.safetensors`; each file appears whole or not at all.

        Raises:
            TypeError: If a part has no `config()`; nothing is written then.
        """
        text = json.dumps(describe(self), indent=2) + "\n"
        with folder_for(Path(folder)) as target, tempfile.TemporaryDirectory(dir=target) as staging:
            weights, config = Path(staging, _WEIGHTS), Path(staging, _CONFIG)
            save_file(_owned(self), weights, metadata={"format": "pt"})
            config.write_text(text)
            # safetensors lets nobody but the owner read its file
            weights.chmod(config.stat().st_mode & 0o777)
            # should it end between the two, no configuration stands beside another's weights
            (target / _CONFIG).unlink(missing_ok=True)
            weights.replace(target / _WEIGHTS)
            config.replace(target / _CONFIG)

    @classmethod
    def from_pretrained(
        cls: type[PretrainedT],
        name: PathLike,
        *,
        classes: Iterable[type | Callable[..., Any]] = (),
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> PretrainedT:
        """Reads a folder that `save_pretrained` wrote; the module is in eval mode.

        Nothing in the files is executed. A base class reads whatever derives from it:
        `Quantizer.from_pretrained` any quantizer.

        Args:
            name: The folder; or, where there is none, "owner/name" on the Hugging Face Hub.
            classes: Classes and functions of one's own that the configuration names.
            revision: On the Hub: a branch, tag or commit.
            cache_dir: On the Hub: where downloads are kept.
            local_files_only: On the Hub: take what was downloaded before, ask nobody.

        Raises:
            FileNotFoundError: If a file is missing.
            ImportError: If `name` is to be looked for on the Hub without huggingface_hub.
            ValueError: If a file is damaged, the two do not fit each other, it is another class, or
                a local folder is asked for a revision.
        """
        folder = Path(name)
        if folder.is_dir():
            if revision is not None:
                raise ValueError(
                    f"{cls.__name__}.from_pretrained found the folder {folder}, which has no "
                    f"revision {revision!r}; leave revision out, or call it elsewhere for the Hub"
                )
        elif isinstance(name, str) and _HUB_NAME.fullmatch(name):
            folder = _download(cls, name, revision, cache_dir, local_files_only)
        config, weights = folder / _CONFIG, folder / _WEIGHTS
        for path in (config, weights):
            if not path.is_file():
                raise FileNotFoundError(
                    f"{cls.__name__}.from_pretrained finds no {path.name} in {folder}; "
                    "it reads what save_pretrained wrote"
                )
        model = _build(cls, config, classes)
        try:
            state = load_file(weights)
        except SafetensorError as error:
            raise ValueError(f"{weights} is damaged or no safetensors file: {error}") from error
        _load(model, state, weights)
        return model.eval()


def _download(
    cls: type,
    name: str,
    revision: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Path:
    """The two files of a repository, both of one commit."""
    tried = f"{cls.__name__}.from_pretrained found no folder {name}, so it means the Hub"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f'{tried}, which needs the extra "hub": pip install huggingface_hub'
        ) from error
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=[_CONFIG, _WEIGHTS],
        )
    except Exception as error:
        error.add_note(tried)
        raise
    return Path(folder)


@contextmanager
def folder_for(target: Path) -> Iterator[Path]:
    """Makes the folder, and takes it away again if nothing came of it."""
    existed = target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        yield target
    except BaseException:
        if not existed and not any(target.iterdir()):
            target.rmdir()
        raise


def _build(cls: type, path: Path, classes: Iterable[type | Callable[..., Any]]) -> Any:
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no JSON file: {error}") from error
    if not isinstance(config, dict) or "class" not in config:
        raise ValueError(f'{path} describes no xq model: it has no "class"')
    model = build(config, [cls, *classes])
    if not isinstance(model, cls):
        raise ValueError(f"{path} describes a {type(model).__name__}, not a {cls.__name__}")
    return model


def _owned(model: nn.Module) -> dict[str, Tensor]:
    """The state, each tensor once: shared modules appear under their first name."""
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), name)
    return {name: state[name].detach().contiguous() for name in names.values()}


def _load(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    want = _owned(model)
    missing, extra = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    if missing or extra:
        raise ValueError(
            f"{path} does not fit its config.json: {len(missing)} tensors missing "
            f"({', '.join(missing[:3])}), {len(extra)} unknown ({', '.join(extra[:3])})"
        )
    for name, tensor in want.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{path} has {name} of shape {tuple(state[name].shape)}, "
                f"its config.json wants {tuple(tensor.shape)}"
            )
        # half precision is fine, but no float of an integer nor the reverse
        if tensor.is_floating_point() != state[name].is_floating_point():
            raise ValueError(
                f"{path} has {name} of {state[name].dtype}, its config.json wants {tensor.dtype}"
            )
    # checked above; the further names of shared tensors are not in the file
    model.load_state_dict(state, strict=False)
