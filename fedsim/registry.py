"""Finds what an experiment names: methods, client updates, datasets, models and partitions.

Each is an entry point, so that an installed package can add its own, or ``package.module:name``
in a module of the user's. What a user can set is read off the signature: the keyword-only
parameters of functions and constructors.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, PydanticUserError, create_model

from fedsim.errors import ConfigError, user_code

Kind = Literal["method", "client", "dataset", "model", "partition"]

# Filled in by fedsim, never by the user: Flower's sampling and the keys of its records.
_PLUMBING = frozenset(
    {
        "fraction_train",
        "fraction_evaluate",
        "min_train_nodes",
        "min_evaluate_nodes",
        "min_available_nodes",
        "weighted_by_key",
        "arrayrecord_key",
        "configrecord_key",
        "train_metrics_aggr_fn",
        "evaluate_metrics_aggr_fn",
        "seed",
    }
)

# The same of a partitioner of Flower's: what is dealt out, to how many.
_DEALT = frozenset({"num_partitions", "partition_by"})


@cache
def _points(kind: Kind) -> dict[str, EntryPoint]:
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=f"fedsim.{kind}s"):
        known = points.get(point.name)
        if known is not None and known.value != point.value:
            raise ConfigError(
                f"two installed packages call a {kind} {point.name!r}: {known.value} and "
                f"{point.value}; uninstall one of them"
            )
        points[point.name] = point
    return points


def names(kind: Kind) -> list[str]:
    """Return the names of a kind that are installed, sorted."""
    return sorted(_points(kind))


def has(kind: Kind, name: str) -> bool:
    """Tell whether a name of a kind is installed."""
    return name in _points(kind)


def entry_point_names(kind: Kind, component: Any) -> list[str]:
    """Return the installed names that stand for a class or function, sorted."""
    name = getattr(component, "__qualname__", "")
    points = [point for point in _points(kind).values() if point.attr == name]
    return sorted(point.name for point in points if point.load() is component)


def find(kind: Kind, name: str) -> Callable[..., Any]:
    """Return what ``name`` stands for.

    Parameters
    ----------
    kind : {"method", "client", "dataset", "model", "partition"}
        What to look for.
    name : str
        An entry point's name, or ``package.module:name``.

    Raises
    ------
    ConfigError
        If there is no such name; the message lists those there are.
    """
    if name in _points(kind):
        with user_code(f"{kind} {name!r} can't be imported"):
            found: Callable[..., Any] = _points(kind)[name].load()
        return found
    module_name, colon, attribute = name.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, names(kind), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"unknown {kind} {name!r}; {hint}allowed: {', '.join(names(kind))}, "
            f"or package.module:name for one of your own"
        )
    if not all(module_name.split(".")):
        raise ConfigError(f"{name!r}: {module_name!r} names no module; write package.module:name")
    with user_code(f"{name!r}: {module_name} can't be imported"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # Only the user's own module may be missing; what it imports in turn has its own error.
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            package = module_name.partition(".")[0]
            if package in sys.modules and _own_file(module_name).is_file():
                # Built-in modules have no file.
                place = getattr(sys.modules[package], "__file__", None) or package
                raise ConfigError(
                    f"{name!r}: the module {place} hides your own folder {package}, which needs "
                    "another name"
                ) from None
            hint = "; install it: pip install flwr-datasets" if package == "flwr_datasets" else ""
            raise ConfigError(
                f"{name!r}: there is no module {error.name!r} in the working directory "
                f"or among the installed packages{hint}"
            ) from None
    if not callable(getattr(module, attribute, None)):
        # Python's own modules and folders without an __init__.py have no file.
        place = getattr(module, "__file__", None) or module_name
        own_file = _own_file(module_name)
        hidden = own_file.is_file() and (place == module_name or not own_file.samefile(place))
        hint = f"; it hides your own {own_file.name}, which needs another name" if hidden else ""
        raise ConfigError(
            f"{name!r}: the module {place} has no function or class {attribute!r}{hint}"
        )
    own: Callable[..., Any] = getattr(module, attribute)
    return own


def _own_file(module_name: str) -> Path:
    """Return where a module of the user's own lies."""
    return Path(f"{module_name.replace('.', '/')}.py").absolute()


def find_dataset(source: str) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """Return a dataset's loader and the arguments that ``source`` gives it.

    ``"npz:FILE"`` is the loader ``npz`` and the location ``FILE``, in which a ``~`` in front is
    written out; ``"digits"`` has no location;
    ``"package.module:function"`` is a loader of the user's own.

    Raises
    ------
    ConfigError
        If there is no such loader, or it needs a location that is missing, or takes none.
    """
    name, colon, location = source.partition(":")
    if not has("dataset", name):
        return find("dataset", source), ()
    loader = find("dataset", name)
    takes_location = accepts(loader, "location")
    if takes_location and not location:
        raise ConfigError(f"the source {source!r} needs a place to read from: {name}:PATH")
    if colon and not takes_location:
        raise ConfigError(f"the source {name!r} takes no place: write source = {name!r}")
    # pathlib's raises for an unknown user.
    return loader, (os.path.expanduser(location),) if location else ()  # noqa: PTH111


def find_update(method: str, client: str) -> Callable[..., Any] | None:
    """Return the class of a method's client update; None means plain SGD.

    Parameters
    ----------
    method : str
        The method's name; its client update is the one of the same name, or what a strategy of
        the user's own says it is, by an attribute ``client``.
    client : str
        A client update of the user's own, which comes first, or "".

    Raises
    ------
    ConfigError
        If there is no such name, or what it stands for is no class, or no dataclass with settings.
    """
    update = find("client", client) if client else None
    if update is None and has("client", method):
        update = find("client", method)
    if update is None:
        update = getattr(find("method", method), "client", None)
        if update is not None and not callable(update):
            raise ConfigError(f"its client is {update!r}; must be a client update's class itself")
    if update is not None:
        own = vars(update).get("__annotations__", {}) if isinstance(update, type) else {}
        settings = [name for name, kind in own.items() if "ClassVar" not in str(kind)]
        if settings and "__dataclass_fields__" not in vars(update):
            raise ConfigError(
                f"'{update.__module__}:{update.__qualname__}' has settings "
                f"({', '.join(settings)}) but is no dataclass; write "
                "@dataclass(frozen=True, kw_only=True) above it"
            )
    return update


def options(function: Callable[..., Any]) -> type[BaseModel]:
    """Return a model of what a user can set of a function or class: types and defaults.

    Examples
    --------
    >>> def dirichlet(y, rng, *, alpha: float = 0.5): ...
    >>> options(dirichlet)().model_dump()
    {'alpha': 0.5}
    """
    fields: dict[str, Any] = {}
    plumbing = _PLUMBING | _DEALT if is_partitioner(function) else _PLUMBING
    for parameter in _parameters(function):
        if parameter.name in plumbing or not _can_be_set(function, parameter):
            continue
        required = parameter.default is inspect.Parameter.empty
        fields[parameter.name] = (
            _type_of(function, parameter.name),
            ... if required else parameter.default,
        )
    name = _name_of(function)
    try:
        return create_model(name, __config__=ConfigDict(extra="forbid", strict=True), **fields)
    except PydanticUserError as error:
        line = str(error).partition(". ")[0]
        raise ConfigError(
            f"{name} has a setting that no file can hold; give the name of a function of your own "
            f"that makes it: {line}"
        ) from None


def is_partitioner(component: object) -> bool:
    """Tell whether it is a class of flwr-datasets' partitioners, without importing that library."""
    return inspect.isclass(component) and any(
        base.__name__ == "Partitioner" and base.__module__.startswith("flwr_datasets.")
        for base in component.__mro__
    )


def _type_of(function: Callable[..., Any], name: str) -> Any:
    """Return the type of a parameter; those of the others need not be known here."""
    holders: Iterable[Any] = [inspect.unwrap(function)]
    if inspect.isclass(function):
        # A dataclass may inherit fields, whose types only their own modules know.
        made = is_dataclass(function)
        holders = function.__mro__ if made else [inspect.unwrap(function.__init__)]
    holder = next((one for one in holders if name in inspect.get_annotations(one)), None)
    if holder is None:
        return Any
    if inspect.isfunction(holder):
        scope = holder.__globals__
    else:
        scope = vars(holder) | vars(sys.modules[holder.__module__])
    hint = inspect.get_annotations(holder)[name]
    alone = SimpleNamespace(__annotations__={name: hint}, __globals__=scope)
    try:
        return _in_files(typing.get_type_hints(alone)[name])
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise ConfigError(
            f"{_name_of(function)}: the type of its setting {name!r} can't be found out: {error}"
        ) from None


def _in_files(hint: Any) -> Any:
    """Return a type as a file can hold it: without NumPy's arrays, lists from what files give."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        kept = [one for one in typing.get_args(hint) if typing.get_origin(one) is not np.ndarray]
        return typing.Union[tuple(map(_in_files, kept))] if kept else hint  # noqa: UP007
    origin = list if hint is list else typing.get_origin(hint)
    if origin in (list, tuple, dict) and typing.get_args(hint):
        inner = [one if one is ... else _in_files(one) for one in typing.get_args(hint)]
        hint = origin[tuple(inner)]
    return typing.Annotated[hint, BeforeValidator(_as_list)] if origin is list else hint


def _as_list(value: Any) -> Any:
    """Arrays of a file are tuples, which can't be changed by mistake."""
    return list(value) if isinstance(value, tuple) else value


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", "options")


def _parameters(function: Callable[..., Any]) -> Iterable[inspect.Parameter]:
    try:
        return inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ConfigError(f"{function!r} doesn't say which settings it has") from None


def _can_be_set(function: Callable[..., Any], parameter: inspect.Parameter) -> bool:
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
        return True
    # Flower's strategies don't mark their settings as keyword-only.
    return inspect.isclass(function) and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Tell whether a function or constructor takes an argument of this name.

    A class that passes ``**others`` on takes what its parent takes.
    """
    mro: tuple[type, ...] = function.__mro__ if inspect.isclass(function) else ()
    makers: list[Any] = [one for one in mro if "__init__" in vars(one)]
    for one in makers or [function]:
        parameters = [*_parameters(one)]
        if any(parameter.name == name for parameter in parameters):
            return True
        if all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters):
            return False
    return False


def passes_on(function: Callable[..., Any]) -> bool:
    """Tell whether it is a function that takes ``**others``, for what it makes."""
    kinds = [parameter.kind for parameter in _parameters(function)]
    return not inspect.isclass(function) and inspect.Parameter.VAR_KEYWORD in kinds


@cache
def check_packages() -> None:
    """Make sure that ``strategies`` and ``clients`` are those that came with fedsim.

    Raises
    ------
    ConfigError
        If another folder of that name comes first on the module path.
    """
    home = Path(__file__).resolve().parent.parent
    for name in ("strategies", "clients"):
        spec = find_spec(name)
        file = spec.origin if spec is not None else None
        if file is None or Path(file).resolve().parent != home / name:
            raise ConfigError(
                f"{Path(file).parent if file else f'a folder {name}'} hides fedsim's own package "
                f"{name!r}; rename it or start from another directory"
            )
