"""Settings: all of them with their defaults in one file, then a file, then the command line."""

import copy
import difflib
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CONFIGS = Path(__file__).parents[1] / "configs"
_DEFAULTS = "defaults.toml"

Config = dict[str, dict[str, Any]]


def read_config(path: str | Path | None, changes: Sequence[tuple[str, str]] = ()) -> Config:
    """The defaults, changed by a file and then by names and values.

    Args:
        path: A TOML file; one of `configs/` may go by its name alone.
        changes: Names such as "data.batch", with values as TOML writes them; text needs no quotes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no TOML, or a name or the kind of a value is unknown.
    """
    schema = _toml(CONFIGS / _DEFAULTS)
    config = copy.deepcopy(schema)
    if path:
        found = next((p for p in (Path(path), CONFIGS / f"{path}.toml") if p.is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"--config {path} is no file; examples/configs has {', '.join(names())}"
            )
        _merge(config, schema, _toml(found), "", str(found))
    for name, text in changes:
        _set(config, schema, name, text)
    return config


def names() -> list[str]:
    """The configurations that are shipped."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml") if path.name != _DEFAULTS)


def as_namespace(config: Config) -> Any:
    """Sections and their settings as attributes: `config.data.batch`."""
    return SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in config.items()})


def command_line(rest: Sequence[str]) -> list[tuple[str, str]]:
    """`--a.b value`, `--a.b=value` and `--set a.b=value` as names and values.

    Raises:
        ValueError: If something else is among them, or a value is missing.
    """
    found, words = [], iter(rest)
    for word in words:
        text = next(words, "") if word == "--set" else word.removeprefix("--")
        if (word != "--set" and not word.startswith("--")) or "." not in text.partition("=")[0]:
            raise ValueError(f"{word!r} is no option; settings are written --data.batch 64")
        name, equals, value = text.partition("=")
        value = value if equals else next(words, None)
        if value is None:
            raise ValueError(f"{word} needs a value")
        found.append((name, value))
    return found


def differences(before: Config, after: Config) -> list[str]:
    """Settings that differ, in words."""
    one, other = dict(_flat(before)), dict(_flat(after))
    return [f"{k} was {one[k]!r}, is {v!r}" for k, v in other.items() if k in one and one[k] != v]


def _merge(config: Any, schema: Any, given: Any, prefix: str, where: str) -> None:
    for key, value in given.items():
        name = f"{prefix}{key}"
        if key not in schema:
            raise _unknown(name, where)
        default = schema[key]
        if isinstance(default, dict) and default:
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name} is a section, got {value!r}")
            _merge(config[key], default, value, f"{name}.", where)
        elif isinstance(default, dict):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name} is a table of arguments, got {value!r}")
            config[key] = value
        else:
            config[key] = _checked(default, value, name, where)


def _set(config: Config, schema: Config, name: str, text: str) -> None:
    """Changes one setting, or one entry within a table of arguments."""
    section, setting, *inner = name.split(".")
    default = schema.get(section, {}).get(setting)
    if default is None or (inner and default != {}):
        raise _unknown(name, f"--{name}")
    # what is text by its default needs no quotes
    plain = isinstance(default, str) and not text.startswith(('"', "'"))
    value = text if plain else _value(text)
    if not inner:
        _merge(config, schema, {section: {setting: value}}, "", f"--{name}")
        return
    table = config[section][setting]
    for key in inner[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ValueError(f"--{name}: {key} is {table!r}, which has no entries")
    table[inner[-1]] = value


def _unknown(name: str, where: str) -> ValueError:
    known = [path for path, _ in _flat(_toml(CONFIGS / _DEFAULTS))]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return ValueError(f"{where}: there is no setting {name}; the nearest is {near}")


def _checked(default: Any, value: Any, name: str, where: str) -> Any:
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        kind = {str: "text", bool: "true or false", int: "an integer", float: "a number"}
        wanted = kind.get(type(default), type(default).__name__)
        raise ValueError(f"{where}: {name} takes {wanted}, got {value!r}")
    return value


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _toml(path: Path) -> Config:
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
