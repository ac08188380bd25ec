"""Files of weights, read without executing anything that is in them."""

import collections
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xq.pretrained import PathLike

State = dict[str, Tensor]

_ZIP = b"PK\x03\x04"
# how a file of torch before 1.6 begins: its magic number, pickled
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# where files keep which weights
_SETS = {
    "model": ("model", "state_dict", "vae_local"),
    "ema": ("ema", "model_ema", "state_dict_ema", "ema_state_dict"),
    "discriminator": ("discriminator",),
    "generator": ("var_wo_ddp",),
}
_LIGHTNING_EMA = "model_ema."
# pickles name functions and types; all but these become `_Inert`
_KNOWN: dict[tuple[str, str], Any] = {("collections", "OrderedDict"): collections.OrderedDict}


def read_sets(path: PathLike) -> dict[str, State]:
    """The sets of weights in a file: "model", "ema", "discriminator", "generator", or some of them.

    Reads safetensors and what `torch.save` writes, in both of its forms. Of the latter only tensors
    and what holds them are made; every other class or function that the file names becomes an
    object that does nothing.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, of another kind or holds no weights.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(
            f"{file} is a folder: give a file in it, or call Tokenizer.from_pretrained for one "
            "that save_pretrained wrote"
        )
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    content = _read(file)
    sets = dict(_sets(content))
    if not sets:
        raise ValueError(f"{file} holds no weights: there is no state dict of tensors in it")
    return {name: _clean(state) for name, state in sets.items()}


def _read(file: Path) -> Any:
    with file.open("rb") as opened:
        start = opened.read(64)
    if start.startswith(_ZIP):
        _check_zip(file)
        return _unpickled(file, mmap=True)
    if _LEGACY in start[:16]:
        return _unpickled(file, mmap=False)
    # the length of the header, then JSON
    if start[8:9] == b"{":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is a damaged safetensors file: {error}") from error
    raise ValueError(f"{file} is neither a safetensors file nor one that torch.save wrote")


def _check_zip(file: Path) -> None:
    """Refuses archives that would unpack to more than they are, and programs."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{file} is damaged, perhaps cut off: {error}") from error
    size = file.stat().st_size
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(
            f"{file} is a compressed archive, which torch.save never writes; unpack it first"
        )
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError(f"{file} is damaged: its entries are larger than the file")
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise ValueError(
            f"{file} is a TorchScript program; save its weights with "
            "torch.save(module.state_dict(), ...) where you trust it"
        )


def _unpickled(file: Path, *, mmap: bool) -> Any:
    """What a file of `torch.save` holds, by way of an unpickler that makes nothing but tensors."""
    module: Any = SimpleNamespace(
        __name__="restricted", Unpickler=_Unpickler, load=_load, UnpicklingError=RuntimeError
    )
    try:
        with warnings.catch_warnings():
            # old forms of storages and such
            warnings.simplefilter("ignore")
            return torch.load(
                os.fspath(file),
                map_location="cpu",
                pickle_module=module,
                weights_only=False,
                mmap=mmap,
            )
    # what the parts of a broken or hostile file raise is without limit
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{file} is damaged or no file of weights: {reason}") from error


class _Inert:
    """Stands for a class or function that is not made; takes whatever a pickle does to it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = update = __call__ = _nothing


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        found = _KNOWN.get((module, name))
        if found is None and module == "torch":
            found = getattr(torch, name, None)
            if not isinstance(found, torch.dtype) and not _is_storage(found):
                found = None
        # a class each time: what happens to it concerns no other
        return type("_Inert", (_Inert,), {}) if found is None else found


def _load(file: Any, **options: Any) -> Any:
    """As `pickle.load`; the older form of files is several pickles, one after the other."""
    return _Unpickler(file, **options).load()


def _is_storage(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, torch.TypedStorage | torch.UntypedStorage)


def _rebuilt(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    """A tensor in a storage that it fits, on which nothing else than its numbers is set."""
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise ValueError(f"a tensor of shape {size} with strides {stride} at {offset}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(storage):
        raise ValueError(f"a tensor of shape {size} in a storage of {len(storage)} numbers")
    empty = torch.empty(0, dtype=storage.dtype)
    return empty.set_(storage._untyped_storage, offset, size, stride)


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _subclassed(rebuild: Callable[..., Any], kind: Any, args: Any, state: Any) -> Any:
    return rebuild(*args) if rebuild in _KNOWN.values() else _Inert()


_KNOWN |= {
    ("torch._utils", "_rebuild_tensor"): _rebuilt,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _subclassed,
    ("torch", "Size"): tuple,
}


def _sets(content: Any) -> Iterator[tuple[str, State]]:
    """The sets by name; a state dict by itself is the model."""
    if not isinstance(content, Mapping):
        return
    found = {}
    for name, places in _SETS.items():
        states = [_tensors(content.get(place)) for place in places]
        if state := next(filter(None, states), None):
            found[name] = state
    if not found and "trainer" in content:
        yield from _sets(content["trainer"])
        return
    if not found:
        found = {"model": _tensors(content)}
    # averages may stand beside the weights
    found = dict(_split_lightning(found.pop("model", {}))) | found
    yield from found.items()


def _tensors(content: Any) -> State:
    """The tensors of a state dict; none of something else."""
    if not isinstance(content, Mapping):
        return {}
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _split_lightning(state: State) -> Iterator[tuple[str, State]]:
    """Sets apart the averages whose names have lost their dots; buffers have none."""
    averages = {k: v for k, v in state.items() if k.startswith(_LIGHTNING_EMA)}
    model = {k: v for k, v in state.items() if k not in averages}
    if model:
        yield "model", model
    dotless = {key: _LIGHTNING_EMA + key.replace(".", "") for key in model}
    if any(name in averages for name in dotless.values()):
        yield "ema", {key: averages.get(dotless[key], model[key]) for key in model}


def _clean(state: State) -> State:
    """Without the prefixes of wrappers."""
    state = {key.replace("_orig_mod.", ""): tensor for key, tensor in state.items()}
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return state
