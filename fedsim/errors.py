"""What fedsim raises when the user's input can't be used: one clear line, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb


class UserError(ValueError):
    """A mistake the user can mend; the message says what, where and what is allowed."""


class ConfigError(UserError):
    """An experiment file, a ``--set`` override or a hyperparameter can't be used."""


class DataError(UserError):
    """A data source, partition or labelling can't be used as asked."""


class EngineError(UserError):
    """The simulation can't start or go on."""


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Turn whatever the user's own code raises into a ConfigError that says which part it is."""
    try:
        yield
    except UserError:
        raise
    except SystemExit as error:
        raise ConfigError(f"{what}: it called sys.exit({error.code!r})") from error
    except Exception as error:
        raise ConfigError(f"{what}: {described(error)}") from error


def described(error: BaseException) -> str:
    """Return an error in one line, with the line of the user's own code where it arose, if any."""
    text = f"{type(error).__name__}: {error}".partition("\n")[0]
    for frame, line in reversed([*walk_tb(error.__traceback__)]):
        file = Path(frame.f_code.co_filename)
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        made = f"{file}" == "<string>" and package != "__main__"  # by dataclasses
        if package not in _OTHERS and "site-packages" not in file.parts and not made:
            return f"{text} ({file.name}, line {line}, in {frame.f_code.co_name})"
    return text


_OTHERS = {"", "fedsim", "strategies", "clients", *sys.stdlib_module_names} - {"__main__"}
"""Packages that aren't the user's own; and what has no name, such as a tape."""
