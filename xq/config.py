"""Modules to JSON and back: constructor arguments, never code.

A module becomes `{"class": name, **arguments}`, a codebook's factory likewise (its sizes come from
its `VQ`), a function `{"function": name}`. Names are looked up among the public ones of `xq` and
what the caller passes in; nothing else is ever imported or executed.
"""

import importlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

_PUBLIC = ("xq.quantizers", "xq.models", "xq.losses")


def describe(value: Any) -> Any:
    """`value` as JSON: modules by their `config()`, functions by name, containers item by item.

    Args:
        value: A module, function, class, number, string, or a container of such.

    Raises:
        TypeError: If a part has no JSON form.

    Examples:
        >>> describe(ResidualQuantizer(FSQ([4, 4]), depth=2))["quantizer"]
        {'class': 'FSQ', 'levels': [4, 4], 'bound': 'even'}
    """
    if isinstance(value, nn.Module) and hasattr(value, "_orig_mod"):
        raise TypeError(
            f"a compiled {type(value._orig_mod).__name__} has no JSON form: describe or save the "
            "module that was compiled (its _orig_mod)"
        )
    if isinstance(value, nn.Module):
        return {"class": type(value).__name__, **describe(_config(value))}
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        _check_distinct(value)
        return [describe(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # a lambda's name finds nothing again
    if callable(value) and getattr(value, "__name__", "").isidentifier():
        return {"function": value.__name__}
    raise TypeError(
        f"cannot write {value!r} as JSON: give a module, a function with a name or plain values"
    )


def build(config: Any, classes: Iterable[type | Callable[..., Any]] = ()) -> Any:
    """The inverse of `describe`.

    Args:
        config: What `describe` returned.
        classes: Classes and functions of one's own that it may name.

    Raises:
        ValueError: If it names something that is neither public in `xq` nor passed in, or
            arguments that its class does not take.

    Examples:
        >>> build({"class": "FSQ", "levels": [4, 4]}).codebook_size
        16
    """
    names = {c.__name__: c for c in classes}
    if isinstance(config, list):
        return [build(item, names.values()) for item in config]
    if not isinstance(config, dict):
        return config
    arguments = {key: build(item, names.values()) for key, item in config.items()}
    if set(arguments) == {"function"}:
        return _find(arguments["function"], names)
    if "class" not in arguments:
        return arguments
    found = _find(arguments.pop("class"), names)
    if not isinstance(found, type):
        raise ValueError(f'"class" names {found.__name__}, which is a function; write "function"')
    if _is_codebook(found):
        return partial(found, **arguments)
    try:
        return found(**arguments)
    except TypeError as error:
        raise ValueError(f"cannot build {found.__name__} from {arguments}: {error}") from error


def _config(module: nn.Module) -> dict[str, Any]:
    config = getattr(module, "config", None)
    try:
        if config is not None:
            return config()
    except NotImplementedError as error:
        raise TypeError(str(error)) from error
    raise TypeError(
        f"{type(module).__name__} has no config(): add one that returns its constructor's "
        "arguments as a dict"
    )


def _check_distinct(items: list[Any] | tuple[Any, ...]) -> None:
    modules = [item for item in items if isinstance(item, nn.Module)]
    if len({id(module) for module in modules}) < len(modules):
        raise TypeError(
            "cannot write a list that holds one module twice as JSON, since it would come back as "
            "two; composites take shared=True instead"
        )


def _is_codebook(found: type) -> bool:
    from xq.quantizers.codebook import Codebook

    return issubclass(found, Codebook)


def _find(name: Any, own: dict[str, Any]) -> Any:
    if not isinstance(name, str):
        raise ValueError(f"a class or function goes by its name, got {name!r}")
    if name in own:
        return own[name]
    for module in map(importlib.import_module, _PUBLIC):
        if name in getattr(module, "__all__", dir(module)):
            found = getattr(module, name)
            if callable(found):
                return found
    raise ValueError(f"{name!r} is not a part of xq; pass your own class with classes=[...]")
