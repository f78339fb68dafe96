"""Tables of an experiment: fixed keys, and the settings of the components that a table names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticSerializationError, to_jsonable_python

from fedsim import registry
from fedsim.errors import ConfigError


class OptionError(ValueError):
    """A setting of a component that can't be used."""

    def __init__(self, key: str, value: Any, problem: str) -> None:
        super().__init__(problem)
        self.key = key
        self.value = value


class Table(BaseModel):
    """A table of the file with a fixed set of keys."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, ser_json_inf_nan="constants"
    )


class OpenTable(Table):
    """A table that names a component and also holds that component's own settings."""

    model_config = ConfigDict(extra="allow")

    kinds: ClassVar[Mapping[str, registry.Kind]] = {}
    """The keys that name a component, and of which kind it is."""

    @classmethod
    def components(cls, table: Mapping[str, Any]) -> Iterable[Callable[..., Any]]:
        """Return what the table names; its settings are the keys that aren't fields."""
        raise NotImplementedError

    @property
    def options(self) -> dict[str, Any]:
        """The component's own settings, defaults included."""
        return dict(self.model_extra or {})

    def options_of(self, component: Callable[..., Any]) -> dict[str, Any]:
        """Return the settings that one of the components takes."""
        fields = registry.options(component).model_fields
        return {name: value for name, value in self.options.items() if name in fields}

    @model_validator(mode="before")
    @classmethod
    def _resolve_options(cls, table: Any) -> Any:
        """Check the component's settings against its signature and fill in its defaults."""
        if not isinstance(table, dict):
            return table
        fixed = {
            key: _name(cls.kinds, key, value)
            if inspect.isroutine(value) or inspect.isclass(value)
            else value
            for key, value in table.items()
            if key in cls.model_fields
        }
        given = {key: value for key, value in table.items() if key not in fixed}
        complete = {name: field.default for name, field in cls.model_fields.items()} | fixed
        resolved: dict[str, Any] = {}
        for component in cls.components(complete):
            model = registry.options(component)
            for key in model.model_fields:
                if key in cls.model_fields:
                    problem = f"{model.__name__} has a setting of this name too; rename that one"
                    raise OptionError(key, complete[key], problem)
            mine = {key: value for key, value in given.items() if key in model.model_fields}
            try:
                settings = model.model_validate(tuples(mine)).model_dump()
            except ValidationError as error:
                key, value, problem = problems(error, model)[0]
                raise OptionError(key, value, problem) from None
            for key, value in settings.items():
                _check_written(key, value, model.model_fields[key].default)
                if key in resolved and value != resolved[key]:
                    problem = (
                        f"the client update's default, while the strategy's is {resolved[key]!r}; "
                        "a setting of both is one: set it, or give both the same default"
                    )
                    raise OptionError(key, value, problem)
            resolved |= settings
        for key in given:
            if key not in resolved:
                allowed = [*cls.model_fields, *resolved]
                raise OptionError(key, given[key], _unknown_key(key, allowed))
        return fixed | resolved


def _name(kinds: Mapping[str, registry.Kind], key: str, component: Any) -> str:
    """Return how a file names a class or function."""
    installed = registry.entry_point_names(kinds[key], component) if key in kinds else []
    if len(installed) == 1:
        return installed[0]
    if installed:
        raise OptionError(key, component, f"give one of its names, {', '.join(installed)}")
    name: str = component.__qualname__
    if not name.isidentifier():
        raise OptionError(key, component, "must stand at the top of a module, not inside another")
    return f"{component.__module__}:{name}"


def _check_written(key: str, value: Any, default: Any) -> None:
    """Make sure that an experiment file can hold a setting; it says None by leaving it out."""
    if value is None and default is None:
        return
    try:
        tomli_w.dumps({key: to_jsonable_python(value, inf_nan_mode="constants")})
    except (TypeError, PydanticSerializationError):
        raise OptionError(key, value, "an experiment file can't hold this value") from None


@contextmanager
def blame(key: str, table: Mapping[str, Any]) -> Iterator[None]:
    """Say of an unknown name under which key it stands."""
    if not isinstance(table[key], str):
        raise OptionError(key, table[key], "must be a valid string")
    try:
        yield
    except ConfigError as error:
        raise OptionError(key, table[key], str(error)) from None


def tuples(value: Any) -> Any:
    """Turn TOML's lists into tuples, which strict types tell apart."""
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def problems(error: ValidationError, model: type[BaseModel]) -> list[tuple[str, Any, str]]:
    """Return (key, value, what is wrong and allowed) for each key of a model that is wrong."""
    found: dict[str, tuple[Any, list[str]]] = {}
    for item in error.errors():
        # The branches of a union follow the key in pydantic's location.
        path = [str(part) for part in item["loc"]][:2]
        value: Any = item["input"]
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, OptionError):
            path, value = [*path, str(cause.key)], cause.value
        elif isinstance(cause, ConfigError):
            path = []
        if item["type"] == "extra_forbidden":
            problem = _unknown_key(path[-1], _known_keys(model, path[:-1]))
        elif cause is not None:
            problem = str(cause)
        elif item["type"] == "string_pattern_mismatch":
            problem = "use letters, digits, '.', '_' and '-' only"
        elif item["type"] == "missing":
            if isinstance(item["loc"][-1], str):
                value, problem = None, "must be given"
            else:  # a place in a list that is too short
                problem = "has too few values"
        elif item["type"] == "model_type":
            problem = "must be a table"
        else:
            problem = item["msg"].replace("Input should be", "must be")
            problem = problem.replace("a valid tuple", "a list")
        known = found.setdefault(".".join(path), (value, []))
        if problem not in known[1]:
            known[1].append(problem)
    return [
        # As the file has it, see `tuples`.
        (key, list(value) if isinstance(value, tuple) else value, ", or ".join(texts))
        for key, (value, texts) in found.items()
    ]


def _known_keys(model: Any, path: Sequence[str]) -> list[str]:
    for key in path:
        model = model.model_fields[key].annotation
    return list(model.model_fields)


def _unknown_key(key: Any, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(key), allowed, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown key; {hint}allowed: {', '.join(allowed)}"


def flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return an experiment's settings by ``table.key``.

    >>> flat({"seed": 1, "training": {"lr": 0.1, "rounds": 5}})
    {'seed': 1, 'training.lr': 0.1, 'training.rounds': 5}
    """
    found: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": content for inner, content in value.items()}
        else:
            found[key] = value
    return found


COMPONENTS = ("method.name", "method.client", "data.source", "model.name", "clients.partition")
"""The settings that name a component; the most telling first."""


def named(key: str, value: str) -> str:
    """Name a setting in short: a component by itself, another with the last part of its key.

    >>> named("method.name", "fedavg"), named("training.lr", "0.1")
    ('fedavg', 'lr=0.1')
    """
    return value if key in COMPONENTS else f"{key.rpartition('.')[2]}={value}"
