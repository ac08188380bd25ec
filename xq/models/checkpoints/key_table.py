"""Tables from the names of another project's weights to those of xq, and back."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

_FIELD = re.compile(r"\\{(\w+)\\}")

TensorMap: TypeAlias = Callable[[Tensor], Tensor]


class Rename(NamedTuple):
    """One name for another, or one prefix for another.

    `{i}`, `{j}` and so on stand for digits, and are the same number on both sides. Both names are
    prefixes if each ends in "." or is empty (which is everything, respectively nothing).

    Attributes:
        old: The other project's name.
        new: The name in xq.
        there: What becomes of the tensor on the way to xq, such as another shape.
        back: The inverse.
    """

    old: str
    new: str
    there: TensorMap | None = None
    back: TensorMap | None = None


class Drop(NamedTuple):
    """What is known and left out: a name, or a prefix if it ends in "."; `{i}` are digits.

    Attributes:
        old: The other project's name, or prefix.
    """

    old: str


class Split(NamedTuple):
    """One tensor for several: equal parts along the first axis, such as of a fused projection.

    Attributes:
        old: The other project's name.
        new: The names in xq, in the order of the parts.
        there: Makes the parts, otherwise.
        back: The inverse.
    """

    old: str
    new: tuple[str, ...]
    there: Callable[[Tensor], Sequence[Tensor]] | None = None
    back: Callable[[Sequence[Tensor]], Tensor] = torch.cat  # pyright: ignore[reportAssignmentType]


Rule: TypeAlias = Rename | Drop | Split


class KeyTable:
    """Renames a state dict in both directions; the first rule that fits a name counts.

    Args:
        rules: In the order in which they are tried.

    Raises:
        ValueError: If a rule renames a prefix to a name, or the two sides of one have different
            digits.

    Examples:
        >>> table = KeyTable([Rename("enc.{i}.w", "encoder.{i}.weight"), Drop("loss.")])
        >>> sorted(table.convert({"enc.0.w": torch.ones(2), "loss.a": torch.ones(1)}))
        ['encoder.0.weight']
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = list(rules)
        for rule in self.rules:
            _check(rule)
        self._there = [(rule, _pattern(rule.old)) for rule in self.rules]
        self._back = [
            (rule, part, _pattern(new))
            for rule in self.rules
            for part, new in enumerate(_news(rule))
        ]

    def convert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The other project's tensors under the names of xq.

        Raises:
            ValueError: If names are unknown, two go to one, or a tensor cannot be split.
        """
        self._refuse(self.unknown(state), "the other project's")
        found: dict[str, Tensor] = {}
        for key, tensor in state.items():
            for new, part in self._convert_one(key, tensor):
                _add(found, new, part, key)
        return found

    def unknown(self, state: Iterable[str]) -> list[str]:
        """The names that no rule fits."""
        return [key for key in state if all(not p.fullmatch(key) for _, p in self._there)]

    def revert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of xq under the other project's names, without what was dropped.

        Raises:
            ValueError: If names are unknown, two go to one, or parts of a whole are missing.
        """
        matches = {key: self._match_back(key) for key in state}
        self._refuse([key for key, match in matches.items() if match is None], "xq's")
        found: dict[str, Tensor] = {}
        parts: dict[str, dict[int, Tensor]] = {}
        for key, match in matches.items():
            assert match is not None
            rule, part, old = match
            if isinstance(rule, Split):
                parts.setdefault(old, {})[part] = state[key]
                if len(parts[old]) == len(rule.new):
                    pieces = [parts[old][i] for i in range(len(rule.new))]
                    _add(found, old, rule.back(pieces), key)
            else:
                assert isinstance(rule, Rename)
                _add(found, old, rule.back(state[key]) if rule.back else state[key], key)
        self._refuse_halves(sorted(parts.keys() - found.keys()))
        return found

    def _convert_one(self, key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        for rule, pattern in self._there:
            if match := pattern.fullmatch(key):
                if isinstance(rule, Drop):
                    return []
                names = [_fill(new, match) for new in _news(rule)]
                if isinstance(rule, Split):
                    parts = rule.there(tensor) if rule.there else _chunk(key, tensor, len(names))
                    return list(zip(names, parts, strict=True))
                return [(names[0], rule.there(tensor) if rule.there else tensor)]
        return []

    def _match_back(self, key: str) -> tuple[Rule, int, str] | None:
        for rule, part, pattern in self._back:
            if match := pattern.fullmatch(key):
                return rule, part, _fill(rule.old, match)
        return None

    @staticmethod
    def _refuse(unknown: list[str], whose: str) -> None:
        if unknown:
            raise ValueError(
                f"KeyTable knows {len(unknown)} of {whose} names not: {listed(unknown)}"
            )

    @staticmethod
    def _refuse_halves(names: list[str]) -> None:
        if names:
            raise ValueError(f"KeyTable has only some of the parts of {listed(names)}")


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names for an error message, the first ones of many."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _news(rule: Rule) -> tuple[str, ...]:
    if isinstance(rule, Drop):
        return ()
    return (rule.new,) if isinstance(rule, Rename) else rule.new


def _is_prefix(name: str) -> bool:
    return not name or name.endswith(".")


def _check(rule: Rule) -> None:
    fields = sorted(re.findall(r"\{(\w+)\}", rule.old))
    for new in _news(rule):
        if _is_prefix(new) != _is_prefix(rule.old):
            raise ValueError(f"{rule} renames a prefix to a name: end both in '.', or neither")
        if sorted(set(re.findall(r"\{(\w+)\}", new))) != sorted(set(fields)):
            raise ValueError(f"{rule} has other digits on one side: use the same {{i}} on both")


def _pattern(name: str) -> re.Pattern[str]:
    """Matches the name, digits where it has fields, and what follows a prefix."""
    seen: set[str] = set()

    def field(match: re.Match[str]) -> str:
        word = match[1]
        if word in seen:
            return f"(?P={word})"
        seen.add(word)
        return rf"(?P<{word}>\d+)"

    pattern = _FIELD.sub(field, re.escape(name))
    return re.compile(pattern + ("(?P<_rest>.+)" if _is_prefix(name) else ""), re.ASCII)


def _fill(name: str, match: re.Match[str]) -> str:
    found = match.groupdict()
    return name.format(**found) + found.get("_rest", "")


def _chunk(key: str, tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    if not tensor.ndim or len(tensor) % parts:
        raise ValueError(
            f"KeyTable splits {key} into {parts} parts, its shape is {tuple(tensor.shape)}"
        )
    return tensor.chunk(parts)


def _add(found: dict[str, Tensor], name: str, tensor: Tensor, source: str) -> None:
    if name in found:
        raise ValueError(f"KeyTable has two tensors for {name}, the second from {source}")
    found[name] = tensor
