"""An experiment: typed, documented, validated; `fedsim.experiment_file` reads it from TOML."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedsim import registry
from fedsim.errors import ConfigError


def _check_participation(value: int | float) -> int | float:
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise ValueError("a share must be above 0 and at most 1.0; a count has no point")
    elif value < 2:
        raise ValueError("a count must be at least 2; 1.0 means all clients")
    return value


def _check_labelled(value: float | tuple[float, float]) -> float | tuple[float, float]:
    if isinstance(value, tuple) and value[0] > value[1]:
        raise ValueError("in [low, high] the first share must not be above the second")
    return value


Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Participation = Annotated[int | float, AfterValidator(_check_participation)]
"""A float is a share of the clients, an integer a count."""


class _OptionError(ValueError):
    """A setting of a component that can't be used."""

    def __init__(self, key: str, value: Any, problem: str) -> None:
        super().__init__(problem)
        self.key = key
        self.value = value


class _Table(BaseModel):
    """A table of the file with a fixed set of keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _OpenTable(_Table):
    """A table that names a component and also holds that component's own settings."""

    model_config = ConfigDict(extra="allow")

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
        fixed = {key: value for key, value in table.items() if key in cls.model_fields}
        given = {key: value for key, value in table.items() if key not in fixed}
        resolved: dict[str, Any] = {}
        for component in cls.components({**_defaults(cls), **fixed}):
            model = registry.options(component)
            mine = {key: value for key, value in given.items() if key in model.model_fields}
            try:
                resolved |= model.model_validate(_tuples(mine)).model_dump()
            except ValidationError as error:
                key, value, problem = _problems(error)[0]
                raise _OptionError(key, value, problem) from None
        for key in given:
            if key not in resolved:
                allowed = [*cls.model_fields, *resolved]
                raise _OptionError(key, given[key], _unknown_key(key, allowed))
        return fixed | resolved


@contextmanager
def _blame(key: str, table: Mapping[str, Any]) -> Iterator[None]:
    """Say of an unknown name under which key it stands."""
    try:
        yield
    except ConfigError as error:
        raise _OptionError(key, table[key], str(error)) from None


def find_update(method: str, client: str) -> Callable[..., Any] | None:
    """Return the class of a method's client update; None means plain SGD.

    Parameters
    ----------
    method : str
        The method's name; its client update is the one of the same name.
    client : str
        A client update of the user's own, which comes first, or "".
    """
    if client:
        return registry.find("client", client)
    return registry.find("client", method) if registry.has("client", method) else None


class Data(_OpenTable):
    """``[data]``: the examples, before they are dealt out."""

    source: str = Field(
        "digits",
        description="digits, fashion-mnist, idx:DIR, npz:FILE, or package.module:function, which "
        "returns a fedsim.data.source.Source",
    )
    imbalance: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="examples of the rarest class / of the most frequent one; 1 = balanced"
    )
    profile: Literal["exponential", "step"] = Field(
        "exponential", description="how the class sizes fall from the first class to the last"
    )

    @classmethod
    def components(cls, table: Mapping[str, Any]) -> Iterable[Callable[..., Any]]:
        """Return the source's loader."""
        with _blame("source", table):
            return [registry.find_dataset(table["source"])[0]]


class Clients(_OpenTable):
    """``[clients]``: who holds what."""

    count: Positive = Field(10, description="number of clients")
    partition: str = Field("iid", description="how the examples are dealt out to the clients")
    labelled: Annotated[Share | tuple[Share, Share], AfterValidator(_check_labelled)] = Field(
        1.0,
        description="share of each client's training examples that keep their label; "
        "[low, high] draws a share for each client",
    )
    unlabelled_clients: Share = Field(0.0, description="share of clients without any label")
    label_each_class: bool = Field(
        False, description="labels go first to one example of each class that a client has"
    )
    min_examples: Positive = Field(1, description="training examples every client has at least")
    local_test: Literal["proportional", "floor"] = Field(
        "proportional",
        description="size of a client's own test set: proportional to its training set and at "
        "least 10; floor: rounded down for each class, as FedLoGe's authors do",
    )

    @classmethod
    def components(cls, table: Mapping[str, Any]) -> Iterable[Callable[..., Any]]:
        """Return the partition."""
        with _blame("partition", table):
            return [registry.find("partition", table["partition"])]


class Model(_OpenTable):
    """``[model]``: the architecture."""

    name: str = Field(
        "cnn",
        description="linear, mlp, cnn, resnet8, resnet18, resnet34, or package.module:function, "
        "which returns a fedsim.models.Model",
    )

    @classmethod
    def components(cls, table: Mapping[str, Any]) -> Iterable[Callable[..., Any]]:
        """Return the model's function."""
        with _blame("name", table):
            return [registry.find("model", table["name"])]


class Method(_OpenTable):
    """``[method]``: the server's strategy and the clients' update, and their hyperparameters."""

    name: str = Field("fedavg", description="a method, or package.module:Class, a Flower strategy")
    client: str = Field(
        "",
        description="package.module:Class of a client update of your own; empty: the method's "
        "own, or plain SGD",
    )

    @classmethod
    def components(cls, table: Mapping[str, Any]) -> Iterable[Callable[..., Any]]:
        """Return the strategy and, where the method has one, its client update."""
        with _blame("name", table):
            strategy = registry.find("method", table["name"])
        with _blame("client", table):
            update = find_update(table["name"], table["client"])
        return [strategy] if update is None else [strategy, update]

    @model_validator(mode="after")
    def _check_update(self) -> Self:
        """Let the client update check its hyperparameters now, not in the workers."""
        update = find_update(self.name, self.client)
        if update is not None:
            update(**self.options_of(update))
        return self


class Training(_Table):
    """``[training]``: the rounds, and the optimiser on the clients."""

    rounds: Positive = Field(10, description="number of rounds")
    participation: Participation = Field(
        1.0, description="share (0.3) or count (12) of the clients that train in a round"
    )
    local_epochs: Positive = Field(1, description="passes of a client over its examples")
    local_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="steps of a client in a round instead of local_epochs; 0: local_epochs"
    )
    batch_size: Positive = Field(10, description="examples in a step")
    lr: Annotated[Finite, Field(gt=0)] = Field(0.05, description="learning rate of SGD")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="momentum of SGD")
    weight_decay: Annotated[Finite, Field(ge=0)] = Field(0.0, description="L2 factor of SGD")
    augmentation: Literal["none", "weak"] = Field(
        "none", description="weak: random crop, and flip where the source allows it"
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="to what inputs of products and convolutions are rounded while training; "
        "tf32: on a GPU only",
    )


class Evaluation(_Table):
    """``[evaluation]``: when and on whom the model is tested."""

    every: Positive = Field(
        1, description="rounds from one evaluation to the next; the last round always has one"
    )
    participation: Participation = Field(
        1.0, description="share or count of the clients whose accuracy is measured"
    )


class Engine(_Table):
    """``[engine]``: what runs the clients."""

    backend: Literal["ray", "inline"] = Field(
        "ray", description="ray: worker processes; inline: this process, for debugging"
    )
    workers: Positive | Literal["auto"] = Field(
        "auto", description="number of Ray workers; auto: one for each core, or for each GPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="where the workers train and test; cuda: GPUs, which several workers may "
        "share; auto: cuda where there is one",
    )
    cohort: Literal["auto", "stacked", "one-by-one"] = Field(
        "auto",
        description="how a worker trains its clients: many side by side on stacked weights, one "
        "after the other, or (auto) side by side where that is faster",
    )


class Experiment(_Table):
    """Everything that decides a run.

    Examples
    --------
    >>> experiment = Experiment(name="mine", training={"rounds": 3})
    >>> experiment.training.rounds, experiment.data.source
    (3, 'digits')
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")] = Field(
        "experiment", description="names the run's folder and figures: letters, digits, . _ -"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of everything random")
    data: Data = Field(default_factory=lambda: Data())
    clients: Clients = Field(default_factory=lambda: Clients())
    model: Model = Field(default_factory=lambda: Model())
    method: Method = Field(default_factory=lambda: Method())
    training: Training = Field(default_factory=lambda: Training())
    evaluation: Evaluation = Field(default_factory=lambda: Evaluation())
    engine: Engine = Field(default_factory=lambda: Engine())

    def __init__(self, **tables: Any) -> None:
        registry.check_packages()
        try:
            super().__init__(**_tuples(tables))
        except ValidationError as error:
            lines = [
                # What a component's own check says is a full line already.
                f"{key} = {value!r}: {problem}" if key else problem
                for key, value, problem in _problems(error)
            ]
            raise ConfigError("\n".join(lines)) from None

    @model_validator(mode="after")
    def _check_cohorts(self) -> Self:
        for name, table in (("training", self.training), ("evaluation", self.evaluation)):
            if isinstance(table.participation, int) and table.participation > self.clients.count:
                problem = f"more than clients.count = {self.clients.count}"
                raise _OptionError(f"{name}.participation", table.participation, problem)
        return self

    def to_toml(self) -> str:
        """Return the experiment as a TOML file with every setting written out."""
        return tomli_w.dumps(self.model_dump(mode="json"))


_TABLES: dict[str, type[_Table]] = {
    "data": Data,
    "clients": Clients,
    "model": Model,
    "method": Method,
    "training": Training,
    "evaluation": Evaluation,
    "engine": Engine,
}


def cohort_size(participation: float, count: int) -> int:
    """Return how many of ``count`` clients a share (float) or a count (int) means, at least 1.

    Examples
    --------
    >>> cohort_size(0.3, 40), cohort_size(5, 40), cohort_size(0.29, 100)
    (12, 5, 29)
    """
    if isinstance(participation, int):
        return participation
    # A share such as 0.29 of 100 must not lose a client to rounding.
    return max(1, int(count * participation + 1e-9))


def _defaults(table: type[BaseModel]) -> dict[str, Any]:
    return {name: field.default for name, field in table.model_fields.items()}


def _tuples(value: Any) -> Any:
    """Turn TOML's lists into tuples, which strict types tell apart."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _problems(error: ValidationError) -> list[tuple[str, Any, str]]:
    """Return (key, value, what is wrong and allowed) for each key that is wrong."""
    problems: dict[str, tuple[Any, list[str]]] = {}
    for item in error.errors():
        # The branches of a union follow the key in pydantic's location.
        path = [str(part) for part in item["loc"]][:2]
        value: Any = item["input"]
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, _OptionError):
            path, value = [*path, cause.key], cause.value
        elif isinstance(cause, ConfigError):
            path = []
        if item["type"] == "extra_forbidden":
            problem = _unknown_key(path[-1], _known_keys(path[:-1]))
        elif cause is not None:
            problem = str(cause)
        elif item["type"] == "string_pattern_mismatch":
            problem = "use letters, digits, '.', '_' and '-' only"
        else:
            problem = (
                item["msg"]
                .replace("Input should be", "must be")
                .replace("a valid dictionary or instance of", "a table, see")
            )
        known = problems.setdefault(".".join(path), (value, []))
        if problem not in known[1]:
            known[1].append(problem)
    return [(key, value, ", or ".join(texts)) for key, (value, texts) in problems.items()]


def _known_keys(path: Sequence[str]) -> list[str]:
    if not path:
        return list(Experiment.model_fields)
    return list(_TABLES[path[0]].model_fields)


def _unknown_key(key: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, allowed, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown key; {hint}allowed: {', '.join(allowed)}"
