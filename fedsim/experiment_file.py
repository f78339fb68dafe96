"""Reads experiment files, with overrides from the command line."""

from __future__ import annotations

import tomllib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim.config import Clients, Data, Experiment, Method, Model
from fedsim.errors import ConfigError
from fedsim.registry import has
from fedsim.settings import OpenTable

# Setting one of these with --set starts from the new component's own defaults.
_SELECTORS: dict[str, type[OpenTable]] = {
    "data.source": Data,
    "clients.partition": Clients,
    "model.name": Model,
    "method.name": Method,
}


def load(file: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file.

    Parameters
    ----------
    file : Path or str
        A TOML file.
    overrides : sequence of str
        ``table.key=value`` each; the value is TOML, or a plain string. ``method.name``,
        ``model.name`` and ``data.source`` start from the new component's defaults and drop the
        file's other keys of that table, ``clients.partition`` drops the old partition's own
        settings; a warning names what is dropped. Another place of the same source, such as
        ``npz:FILE`` instead of ``npz:OTHER``, drops nothing.

    Raises
    ------
    ConfigError
        A line for each mistake: file, key, value, and what is allowed.
    """
    try:
        # Some editors write a byte order mark.
        tables = tomllib.loads(Path(file).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such experiment file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: can't be read: {error}") from None
    except (ValueError, RecursionError) as error:  # also for numbers too long, brackets too deep
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
    key, equals, text = (part.strip() for part in override.partition("="))
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        table = {"value": text}
    if not equals or not key or len(table) > 1:
        raise ConfigError(f"--set {override!r}: write --set table.key=value, once for each key")
    check_key(key, f"--set {override!r}")
    return key, table["value"]


def check_key(key: str, given: str) -> None:
    """Raise `ConfigError` if a key isn't written as it is, or is a table's, whose keys would go."""
    if set(key) & set("\"'[]"):
        raise ConfigError(f"{given}: write table.key without quotes or brackets")
    field = Experiment.model_fields.get(key)
    if field is not None and field.default_factory is not None:
        raise ConfigError(f"{given}: {key} is a table; write {key}.key=value for each of its keys")


def _override(tables: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    if len(path) > 1:
        raise ConfigError(f"--set {key}: write --set table.key=value")
    table = tables.setdefault(path[0], {}) if path else tables
    if not isinstance(table, dict):
        raise ConfigError(f"--set {key}: {path[0]} isn't a table")
    if key in _SELECTORS and _differ(
        table.get(last, _SELECTORS[key].model_fields[last].default), value
    ):
        keep = set(Clients.model_fields) if key == "clients.partition" else {last}
        dropped = [name for name in table if name not in keep]
        for name in dropped:
            del table[name]
        if dropped:
            names = ", ".join(f"{path[0]}.{name}" for name in dropped)
            warnings.warn(f"--set {key}={value} drops the file's {names}", stacklevel=3)
    table[last] = value


def _differ(old: Any, new: Any) -> bool:
    """Tell whether two names stand for different components; a source's place isn't its name."""
    kind = str(new).partition(":")[0]
    same_source = has("dataset", kind) and str(old).partition(":")[0] == kind
    return bool(old != new) and not same_source
