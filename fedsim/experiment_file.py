"""Reads experiment files, with overrides from the command line."""

from __future__ import annotations

import tomllib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim.config import Clients, Experiment
from fedsim.errors import ConfigError

# Setting one of these with --set starts from the new component's own defaults.
_SELECTORS = ("data.source", "clients.partition", "model.name", "method.name")


def load(file: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file.

    Parameters
    ----------
    file : Path
        A TOML file.
    overrides : sequence of str
        ``table.key=value`` each; the value is TOML, or a plain string. ``method.name``,
        ``model.name`` and ``data.source`` start from the new component's defaults and drop the
        file's other keys of that table, ``clients.partition`` drops the old partition's own
        settings; a warning names what is dropped.

    Raises
    ------
    ConfigError
        A line for each mistake: file, key, value, and what is allowed.
    """
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such experiment file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: can't be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None
    settings = [_parse_override(override) for override in overrides]
    # Components first, so that their own settings can stand before or after them.
    for key, value in sorted(settings, key=lambda setting: setting[0] not in _SELECTORS):
        _override(tables, key, value)
    try:
        return Experiment(**tables)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{file}: {line}" for line in str(error).split("\n"))) from None


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write --set table.key=value")
    try:
        return key.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text


def _override(tables: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    if len(path) > 1:
        raise ConfigError(f"--set {key}: write --set table.key=value")
    table = tables.setdefault(path[0], {}) if path else tables
    if not isinstance(table, dict):
        raise ConfigError(f"--set {key}: {path[0]} isn't a table")
    if key in _SELECTORS and table.get(last) != value:
        keep = set(Clients.model_fields) if key == "clients.partition" else {last}
        dropped = [name for name in table if name not in keep]
        for name in dropped:
            del table[name]
        if dropped:
            names = ", ".join(f"{path[0]}.{name}" for name in dropped)
            warnings.warn(f"--set {key}={value} drops the file's {names}", stacklevel=3)
    table[last] = value
