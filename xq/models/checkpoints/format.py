"""What the layer knows of one kind of released file."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from xq.models.checkpoints.key_table import KeyTable, listed

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Format(NamedTuple):
    """One kind of released file.

    Attributes:
        name: What `load_checkpoint(format=...)` takes, such as "var".
        title: For messages, such as "VAR multi-scale VQVAE".
        recognise: Whether a state dict is of this kind; looks at names and shapes alone.
        build: The module of xq that fits the shapes, called under `torch.device("meta")`. What
            shapes do not tell is that of the released files.
        table: The names, where these depend on the state dict.
    """

    name: str
    title: str
    recognise: Callable[[Mapping[str, Tensor]], bool]
    build: Callable[[Mapping[str, Tensor]], nn.Module]
    table: Callable[[Mapping[str, Tensor]], KeyTable]

    def read(self, state: Mapping[str, Tensor], into: nn.Module | None = None) -> nn.Module:
        """The module with the weights of a state dict, in eval mode.

        Floating tensors take the module's precision, so that files in half precision can be used
        as they are.

        Args:
            state: The other project's names and tensors, which are copied.
            into: A module to fill instead of a new one, for what shapes do not tell.

        Raises:
            ValueError: If names are unknown or missing, or shapes do not fit.
        """
        try:
            table = self.table(state)
            module = self._built(state) if into is None else into
        except KeyError as error:
            raise ValueError(f"{self.title}: there is no tensor {error}") from error
        unknown, missing = _misfit(table, state, module)
        if unknown or missing:
            raise ValueError(
                f"{self.title} has no place for {len(unknown)} tensors "
                f"({listed(unknown) or 'none'}) and lacks {len(missing)} "
                f"({listed(missing) or 'none'}; in the names of xq)"
            )
        load_strictly(module, table.convert(state), self.title)
        if into is None and not any(tensor.is_meta for tensor in state.values()):
            self._fill_buffers(module, state)
        return module.eval()

    def write(
        self, module: nn.Module, like: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The way back: a module's weights by the other project's names.

        What xq has no place for, such as counts of uses, is left out.

        Args:
            module: What `read` gave, or one of the same parts.
            like: A state dict of this kind with the same layout, such as the file's, where names or
                shapes over there depend on it.

        Raises:
            ValueError: If names are unknown, or `like` is needed.
        """
        try:
            table = self.table({} if like is None else like)
        except (KeyError, ValueError) as error:
            if like is not None:
                raise
            raise ValueError(
                f"{self.title} has names that depend on its layout: give write(module, like=...) a "
                "state dict of that kind, such as the file's that the module was read from"
            ) from error
        return table.revert(_owned(module))

    def misfit(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """The names of a state dict that are unknown, and those in xq that it has nothing for."""
        return _misfit(self.table(state), state, self._built(state))

    def _built(self, state: Mapping[str, Tensor]) -> nn.Module:
        with torch.device("meta"):
            return self.build(state)

    def _fill_buffers(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Takes what is in no file, such as sums for the next update, from a module just made."""
        left = [(m, name) for m, name, buffer in _buffers(module) if buffer.is_meta]
        if not left:
            return
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            made = dict(self.build(state).named_modules())
        paths = {id(m): path for path, m in module.named_modules()}
        for owner, name in left:
            owner._buffers[name] = made[paths[id(owner)]]._buffers[name]


def _misfit(
    table: KeyTable, state: Mapping[str, Tensor], module: nn.Module
) -> tuple[list[str], list[str]]:
    unknown = table.unknown(state)
    strange = set(unknown)
    have = table.convert({key: state[key] for key in state if key not in strange})
    return unknown, sorted(_owned(module).keys() - have.keys())


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], title: str) -> None:
    """Gives a module copies of tensors, in its dtypes and on its device, or theirs if it has none.

    Raises:
        ValueError: If names are left over, or shapes do not fit.
    """
    want = _owned(module)
    if extra := sorted(state.keys() - want.keys()):
        raise ValueError(
            f"{title} has {len(extra)} tensors left over ({listed(extra)}), in the names of xq"
        )
    for name, tensor in want.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{title} has {name} of shape {tuple(state[name].shape)}, the module asks for "
                f"{tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() != state[name].is_floating_point():
            raise ValueError(f"{title} has {name} of {state[name].dtype}, not {tensor.dtype}")
    copies = {name: _copy(state[name], tensor) for name, tensor in want.items()}
    # checked above; the further names of shared tensors have none of their own
    module.load_state_dict(copies, strict=False, assign=True)


def _copy(tensor: Tensor, like: Tensor) -> Tensor:
    device = tensor.device if like.is_meta else like.device
    copy = torch.empty_like(like, device=device, memory_format=torch.contiguous_format)
    return copy.copy_(tensor.detach())


def _owned(module: nn.Module) -> dict[str, Tensor]:
    """The state, each tensor once: shared modules appear under their first name."""
    names: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), name)
    return {name: state[name] for name in names.values()}


def _buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                yield owner, name, buffer
