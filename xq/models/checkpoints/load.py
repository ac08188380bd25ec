"""From a file to a module: what is in it, whose it is, and the module of xq for it."""

import importlib
import logging
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from torch import Tensor, nn

from xq.models.checkpoints.format import Format
from xq.models.checkpoints.key_table import listed
from xq.models.checkpoints.lora import merge_lora
from xq.models.checkpoints.reading import State, read_sets
from xq.pretrained import PathLike

_LOG = logging.getLogger("xq.checkpoints")

# a module each, with FORMAT or FORMATS
PROJECTS = (
    "bsq_vit",
    "ibq",
    "llamagen",
    "llamagen_generator",
    "open_magvit2",
    "rar",
    "rqvae",
    "taming",
    "titok",
    "var",
    "var_generator",
    "vector_quantize_pytorch",
    "xqgan",
    "xqgan_discriminators",
)


class Found(NamedTuple):
    """What a file holds.

    Attributes:
        format: The name of its kind, for `load_checkpoint(format=...)`.
        title: The same for people.
        weights: The set of weights that is read: "ema", "model", "discriminator" or
            "generator".
        sets: All sets that the file has.
        tensors: How many tensors that set has.
        numbers: How many numbers these have together, those that are not read included.
    """

    format: str
    title: str
    weights: str
    sets: tuple[str, ...]
    tensors: int
    numbers: int

    def __str__(self) -> str:
        others = [name for name in self.sets if name != self.weights]
        rest = f" (the file also has {', '.join(others)})" if others else ""
        return (
            f"{self.title} ({self.format}): weights {self.weights!r}{rest}, "
            f"{self.tensors} tensors, {self.numbers / 1e6:.2f} M numbers"
        )


def load_checkpoint(
    path: PathLike,
    *,
    format: str | None = None,
    weights: str | None = None,
    prefix: str = "",
    into: nn.Module | None = None,
) -> nn.Module:
    """The module of xq for a file of weights of another project, in eval mode.

    The kind of file is told from names and shapes, and what was found is logged at INFO level by
    the logger "xq.checkpoints". Nothing in the file is executed. Every tensor has to find its
    place, and every place its tensor.

    Args:
        path: A file of safetensors or of `torch.save` (`.pt`, `.pth`, `.ckpt`, `.bin`).
        format: The name of a kind, see `formats`; told from the file by default.
        weights: "ema" for running averages, "model" for the weights themselves, or
            "discriminator" or "generator". By default the averages where the file has them.
        prefix: Only what is below this, such as "quantizer." in a model of one's own.
        into: A module to fill instead of a new one, for what shapes do not tell.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, has not these weights, is of no known kind, or does not fit.

    Examples:
        >>> state = {"frozen_codebook": torch.ones(64, 8), "code_transform.weight": torch.eye(8)}
        >>> torch.save(state, "simvq.pt")  # a file of vector-quantize-pytorch
        >>> quantizer = load_checkpoint("simvq.pt")
        >>> quantizer.dim, quantizer.codebook_size
        (8, 64)
    """
    found, kind, state = _find(path, format, weights, prefix)
    _LOG.info("%s: %s", path, found)
    try:
        return kind.read(state, into)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def inspect_checkpoint(
    path: PathLike, *, format: str | None = None, weights: str | None = None, prefix: str = ""
) -> Found:
    """What `load_checkpoint` would read.

    Args:
        path: As there.
        format: As there.
        weights: As there.
        prefix: As there.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, has not these weights or is of no known kind.
    """
    return _find(path, format, weights, prefix)[0]


@cache
def formats() -> dict[str, Format]:
    """The kinds of files that `load_checkpoint` knows, by name."""
    found: dict[str, Format] = {}
    for project in PROJECTS:
        module = importlib.import_module(f"xq.models.checkpoints.{project}")
        for each in getattr(module, "FORMATS", None) or (module.FORMAT,):
            found[each.name] = each
    return found


def _find(
    path: PathLike, format: str | None, weights: str | None, prefix: str
) -> tuple[Found, Format, State]:
    if format is not None and format not in formats():
        raise ValueError(
            f"load_checkpoint knows the formats {', '.join(formats())}, got {format!r}"
        )
    sets = read_sets(path)
    weights = _chosen(path, sets, weights)
    state = _below(path, sets[weights], prefix)
    try:
        state = merge_lora(state)
        kind = _recognised(state) if format is None else formats()[format]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    numbers = sum(tensor.numel() for tensor in state.values())
    found = Found(kind.name, kind.title, weights, tuple(sets), len(state), numbers)
    return found, kind, state


def _chosen(path: PathLike, sets: Mapping[str, State], weights: str | None) -> str:
    if weights is None:
        return next(name for name in ("ema", "model", *sets) if name in sets)
    if weights not in sets:
        raise ValueError(f"{path} has no weights {weights!r}, it has {listed(map(repr, sets))}")
    return weights


def _below(path: PathLike, state: State, prefix: str) -> State:
    below = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not below:
        parts = sorted({key.split(".")[0] + "." for key in state})
        raise ValueError(f"{path} has nothing below {prefix!r}, its parts are {listed(parts)}")
    return below


def _recognised(state: Mapping[str, Tensor]) -> Format:
    kinds = formats().values()
    for kind in kinds:
        if kind.recognise(state):
            return kind
    if any(key.startswith("quantizer.") for key in state) and all(map(_is_ours, state)):
        raise ValueError(
            "these are xq's own names: Tokenizer.from_pretrained reads the folder of this file"
        )
    known = f"the formats known are {', '.join(kind.name for kind in kinds)}"
    unknown = {kind.name: _unknown(kind, state) for kind in kinds}
    name = min(unknown, key=lambda name: len(unknown[name]))
    if len(unknown[name]) == len(state):
        raise ValueError(
            f"these {len(state)} tensors are of no known format: {listed(state)}; {known}"
        )
    strange, missing = unknown[name], _missing(formats()[name], state)
    raise ValueError(
        f"these {len(state)} tensors are of no known format. The nearest is {name}: unknown "
        f"to it are {len(strange)} ({listed(strange) or 'none'}), {missing}; {known}"
    )


def _is_ours(key: str) -> bool:
    return key.startswith(("encoder.", "quantizer.", "decoder."))


def _unknown(kind: Format, state: Mapping[str, Tensor]) -> list[str]:
    try:
        return kind.table(state).unknown(state)
    # whatever a table makes of tensors that are not meant for it
    except Exception:
        return list(state)


def _missing(kind: Format, state: Mapping[str, Tensor]) -> str:
    try:
        _, missing = kind.misfit(state)
    except KeyError as error:
        return f"missing at least {error}"
    except Exception as error:
        return f"and it cannot be built: {error}"
    return f"missing {len(missing)} ({listed(missing) or 'none'})"
