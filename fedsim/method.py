"""What an experiment's method is made of: a strategy, a client update, and how clients train."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

from fedsim import registry
from fedsim.config import Experiment, cohort_size
from fedsim.data.class_groups import GROUPS
from fedsim.errors import ConfigError, user_code

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from fedsim.engine.training import LocalTraining
    from fedsim.engine.update import ClientUpdate

_VIEW = re.compile(r"(generic|personal)(-[a-z0-9]+)*")


def make_strategy(experiment: Experiment) -> Strategy:
    """Return the server's strategy, with the experiment's hyperparameters and participation.

    In a server app for Flower's own runtimes it is what starts the rounds, see
    `fedsim.initial_arrays`.
    """
    from flwr.serverapp.strategy import Strategy

    from fedsim.engine import flower
    from fedsim.engine.update import ClientUpdate

    name = experiment.method.name
    make = registry.find("method", name)
    count = experiment.clients.count
    train = cohort_size(experiment.training.participation, count)
    evaluate = cohort_size(experiment.evaluation.participation, count)
    # Flower rounds a share down: the minimum makes the cohort exact.
    plumbing = {
        "fraction_train": train / count,
        "min_train_nodes": train,
        "fraction_evaluate": evaluate / count,
        "min_evaluate_nodes": evaluate,
        "min_available_nodes": 1,
        "seed": experiment.seed,
    }
    settings = experiment.method.options_of(make)
    every = registry.passes_on(make)
    settings |= {k: value for k, value in plumbing.items() if every or registry.accepts(make, k)}
    with user_code(f"method.name = {name!r}"), flower.quiet_log():
        strategy, taken = _made(make, settings, plumbing)
    if not isinstance(strategy, Strategy):
        is_update = isinstance(strategy, ClientUpdate)
        hint = "; it is a client update: give it as method.client" if is_update else ""
        raise ConfigError(f"method.name = {name!r}: isn't a flwr.serverapp.strategy.Strategy{hint}")
    needed = getattr(strategy, "min_available_nodes", 0)
    if needed > count:
        raise ConfigError(
            f"method.name = {name!r} waits until {needed} clients are connected "
            f"(min_available_nodes), but clients.count = {count}"
        )
    for key, cohort, accepted in (
        ("training", train, {"fraction_train", "min_train_nodes"}),
        ("evaluation", evaluate, {"fraction_evaluate", "min_evaluate_nodes"}),
    ):
        if cohort < count and not accepted & taken.keys():
            warnings.warn(
                f"method.name = {name!r} doesn't take {' or '.join(sorted(accepted))}, or sets it "
                f"itself, so that {key}.participation has no effect: it chooses the clients by "
                "itself. A constructor that passes **others on to its parent's takes them",
                stacklevel=2,
            )
    is_flowers = getattr(make, "__module__", "").startswith("flwr.")
    unused = registry.options(make).model_fields.get("eta_l")
    if is_flowers and unused and taken["eta_l"] != unused.default:
        warnings.warn(
            f"method.eta_l = {taken['eta_l']} has no effect: Flower's strategies only say it; the "
            "clients' learning rate is training.lr",
            stacklevel=2,
        )
    return strategy


def _made(
    make: Callable[..., Any], settings: dict[str, Any], plumbing: Container[str]
) -> tuple[Any, dict[str, Any]]:
    """Call a strategy's constructor, without what its parent is given already, or doesn't take.

    Returns the strategy, and what it has taken.
    """
    while True:
        try:
            return make(**settings), settings
        except TypeError as error:
            found = re.search(r"(?:multiple values for|unexpected).* argument '(\w+)'", str(error))
            if found is None or found[1] not in settings or found[1] not in plumbing:
                raise
            settings = {name: value for name, value in settings.items() if name != found[1]}


def make_update(experiment: Experiment) -> ClientUpdate:
    """Return the clients' part of the method, with the experiment's hyperparameters."""
    from fedsim.engine.update import ClientUpdate, LocalSGD

    method = experiment.method
    make = registry.find_update(method.name, method.client) or LocalSGD
    what = f"method.client = {method.client!r}"
    if not method.client:
        what = f"method.name = {method.name!r}: its client {getattr(make, '__name__', make)!r}"
    with user_code(what):
        update = make(**method.options_of(make))
    if not isinstance(update, ClientUpdate):
        raise ConfigError(f"{what}: isn't a fedsim.engine.update.ClientUpdate")
    if not update.views:
        raise ConfigError(f"{what}: has no views; generic is the usual one")
    for i, view in enumerate(update.views):
        if view in update.views[:i]:
            raise ConfigError(f"{what}: has the view {view!r} twice; once is enough")
        if not _VIEW.fullmatch(view) or view.endswith(GROUPS):
            raise ConfigError(
                f"{what}: calls a view {view!r}; must be generic, "
                "personal, or generic-... or personal-... of small letters, digits and '-', not "
                f"with {', '.join(GROUPS)} at its end"
            )
    return update


def local_training(experiment: Experiment) -> LocalTraining:
    """Return how the experiment's clients train."""
    from fedsim.engine.training import LocalTraining

    settings = experiment.training.model_dump(exclude={"participation"})
    epochs, steps = settings.pop("local_epochs"), settings.pop("local_steps")
    return LocalTraining(epochs=epochs, steps=steps, **settings)
