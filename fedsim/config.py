"""An experiment: typed, documented, validated; `fedsim.experiment_file` reads it from TOML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import tomli_w
from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from fedsim import registry
from fedsim.errors import ConfigError, user_code
from fedsim.settings import OpenTable, OptionError, Table, blame, problems, tuples


def _check_participation(value: int | float) -> int | float:
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise ValueError("a share must be above 0 and at most 1.0; a count has no point")
    elif value < 2:
        raise ValueError("a count must be at least 2; one of 50 is 0.02, and 1.0 all clients")
    return value


def _check_labelled(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    try:
        share = validate(value)
    except ValidationError:  # it says of each branch of the union in turn what is wrong
        raise ValueError("must be a share from 0 to 1, or [low, high]") from None
    if isinstance(share, tuple) and share[0] > share[1]:
        raise ValueError("in [low, high] the first share must not be above the second")
    return share


Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Participation = Annotated[int | float, AfterValidator(_check_participation)]
"""A float is a share of the clients, an integer a count."""


class Data(OpenTable):
    """``[data]``: the examples, before they are dealt out."""

    kinds: ClassVar[Mapping[str, registry.Kind]] = {"source": "dataset"}

    source: str = Field(
        "digits",
        description="digits, fashion-mnist, cifar10:FILE, cifar100:FILE, folder:DIR, parquet:PATH, "
        "npz:FILE, idx:DIR, hf:NAME, or package.module:function, which returns a "
        "fedsim.data.source.Source",
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
        with blame("source", table):
            return [registry.find_dataset(table["source"])[0]]


class Clients(OpenTable):
    """``[clients]``: who holds what."""

    kinds: ClassVar[Mapping[str, registry.Kind]] = {"partition": "partition"}

    count: Positive = Field(10, description="number of clients")
    partition: str = Field("iid", description="how the examples are dealt out to the clients")
    labelled: Annotated[Share | tuple[Share, Share], WrapValidator(_check_labelled)] = Field(
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
        with blame("partition", table):
            return [registry.find("partition", table["partition"])]


class Model(OpenTable):
    """``[model]``: the architecture."""

    kinds: ClassVar[Mapping[str, registry.Kind]] = {"name": "model"}

    name: str = Field(
        "cnn",
        description="linear, mlp, cnn, resnet8, resnet18, resnet34, or package.module:function, "
        "which returns a fedsim.models.Model",
    )

    @classmethod
    def components(cls, table: Mapping[str, Any]) -> Iterable[Callable[..., Any]]:
        """Return the model's function."""
        with blame("name", table):
            return [registry.find("model", table["name"])]


class Method(OpenTable):
    """``[method]``: the server's strategy and the clients' update, and their hyperparameters."""

    kinds: ClassVar[Mapping[str, registry.Kind]] = {"name": "method", "client": "client"}

    name: str = Field("fedavg", description="a method, or package.module:Class, a Flower strategy")
    client: str = Field(
        "",
        description="package.module:Class of a client update of your own; empty: the method's "
        "own, or plain SGD",
    )

    @classmethod
    def components(cls, table: Mapping[str, Any]) -> Iterable[Callable[..., Any]]:
        """Return the strategy and, where the method has one, its client update."""
        with blame("name", table):
            strategy = registry.find("method", table["name"])
        with blame("client" if table["client"] else "name", table):
            update = registry.find_update(table["name"], table["client"])
        return [strategy] if update is None else [strategy, update]

    @model_validator(mode="after")
    def _check_update(self) -> Self:
        """Let the client update check its hyperparameters now, not in the workers."""
        update = registry.find_update(self.name, self.client)
        if update is not None:
            with user_code(getattr(update, "__name__", "the client update")):
                update(**self.options_of(update))
        return self


class Training(Table):
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
    lr_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="each round's learning rate over that of the round before"
    )
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="cosine: falls along half a cosine, towards 0 after the last round"
    )
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


class Evaluation(Table):
    """``[evaluation]``: when and on whom the model is tested."""

    every: Positive = Field(
        1, description="rounds from one evaluation to the next; the last round always has one"
    )
    participation: Participation = Field(
        1.0, description="share or count of the clients whose accuracy is measured"
    )


class Engine(Table):
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


class Experiment(Table):
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
            super().__init__(**tuples(tables))
        except ValidationError as error:
            lines = [
                # What a component's own check says is a full line already.
                f"{key} = {value!r}: {problem}" if key else problem
                for key, value, problem in problems(error, type(self))
            ]
            raise ConfigError("\n".join(lines)) from None

    @model_validator(mode="after")
    def _check_cohorts(self) -> Self:
        for name, table in (("training", self.training), ("evaluation", self.evaluation)):
            if isinstance(table.participation, int) and table.participation > self.clients.count:
                problem = f"more than clients.count = {self.clients.count}"
                raise OptionError(f"{name}.participation", table.participation, problem)
        return self

    def to_toml(self) -> str:
        """Return the experiment as a TOML file with every setting but None written out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


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
