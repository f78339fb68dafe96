"""The round loop: what a Flower strategy's ``start`` does, with records and reproducible draws."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedsim.engine import flower
from fedsim.engine.clock import Clock
from fedsim.engine.grid import SimulatedGrid, TrainReport
from fedsim.errors import EngineError, described
from fedsim.metrics import GROUPS, column

FAILURES_SHOWN = 3
"""Failed clients named in a round's warning."""

MEASURES = {"": "accuracy"} | {group: f"{group}_accuracy" for group in GROUPS}
"""Group of classes, or all of them -> the metric of a view; see `column`."""


@dataclass(frozen=True, slots=True)
class Round:
    """What a round gave.

    Attributes
    ----------
    row : dict
        The round's row of ``rounds.csv``.
    training : dict of list
        The columns of ``training.csv``, with a value for each client that trained.
    clients : pandas.DataFrame or None
        A row for each tested client, if the round was evaluated.
    seconds : dict
        Where the time went, by part.
    arrays : ArrayRecord
        The global model after the round.
    """

    row: dict[str, Any]
    training: dict[str, list[Any]]
    clients: pd.DataFrame | None
    seconds: dict[str, float]
    arrays: ArrayRecord


def run_rounds(
    strategy: Strategy,
    grid: SimulatedGrid,
    arrays: ArrayRecord,
    *,
    rounds: int,
    evaluate_every: int,
    seed: int,
    finished: int = 0,
) -> Iterator[Round]:
    """Run federated rounds, yielding after each.

    Parameters
    ----------
    strategy : flwr.serverapp.strategy.Strategy
        Any Flower strategy.
    grid : SimulatedGrid
        The clients.
    arrays : ArrayRecord
        The model to start from.
    rounds : int
        How many rounds in all.
    evaluate_every : int
        The model is tested after every so many rounds, and after the last.
    seed : int
        The experiment's seed.
    finished : int
        How many rounds there were before; strategy, grid and arrays are as they were then.

    Yields
    ------
    Round
        A round with no usable reply keeps the old model, with a warning.
    """
    grid.weights = flower.weights_of(strategy)
    for round in range(finished + 1, rounds + 1):
        clock = Clock()
        with flower.quiet_log():
            with flower.seeded_draws(seed, "configure_train", round):
                messages = _messages(strategy, "configure_train", round, arrays, grid)
            clock.lap("configure")
            grid.report = TrainReport()
            replies = list(grid.send_and_receive(messages))
            clock.lap("train")
            _split(clock.seconds, "train", grid.report.seconds)
            _tell_failures(round, grid.report.failures, len(messages))
            with flower.seeded_draws(seed, "aggregate_train", round):
                usable = _usable(replies)
                new = _aggregate(strategy, round, replies) if usable else None
        if new is None:
            why = "the strategy returned no model" if usable else (
                "no client had anything to average" if messages else "the strategy chose no client"
            )  # fmt: skip
            warnings.warn(f"round {round}: {why}; the model stays as it was", stacklevel=2)
        else:
            arrays = _accept(round, new, arrays)
        clock.lap("aggregate")
        figures: dict[str, float] = {}
        clients: pd.DataFrame | None = None
        if round % evaluate_every == 0 or round == rounds:
            generic, clients = _evaluate(strategy, grid, arrays, round, seed)
            figures = _figures(generic, clients)
            clock.lap("evaluate")
        row = _row(round, grid, figures, sum(clock.seconds.values()))
        yield Round(row, grid.report.metrics, clients, clock.seconds, arrays)


def _messages(
    strategy: Strategy, configure: str, round: int, arrays: ArrayRecord, grid: SimulatedGrid
) -> Sequence[Message]:
    """Return a round's messages such that they can be counted: what is yielded is drawn at once."""
    try:
        found = getattr(strategy, configure)(round, arrays, ConfigRecord(), grid)
        return found if isinstance(found, Sequence) else list(found)
    except flower.FlowerError as error:
        raise EngineError(
            f"round {round}: {type(strategy).__name__}.{configure}: {described(error)}"
        ) from None


def _split(seconds: dict[str, float], part: str, of_part: dict[str, float]) -> None:
    """Put the parts of a part in its place; the rest of it is the making of messages."""
    seconds["messages"] = seconds.pop(part) - sum(of_part.values())
    seconds |= of_part


def _aggregate(strategy: Strategy, round: int, replies: list[Message]) -> ArrayRecord | None:
    try:
        found: Any = strategy.aggregate_train(round, replies)
    except (flower.FlowerError, KeyError) as error:
        # Flower's strategies refuse replies of another form than theirs, ours miss a group.
        raise EngineError(
            f"round {round}: {type(strategy).__name__} can't average what the clients upload "
            f"({described(error)}); do method.name and method.client belong together?"
        ) from None
    match found:
        case (None | ArrayRecord() as new, None | MetricRecord()):
            return new
    parts = ", ".join(type(one).__name__ for one in found) if isinstance(found, tuple) else None
    raise EngineError(
        f"round {round}: {type(strategy).__name__}.aggregate_train must return an ArrayRecord or "
        f"None, and a MetricRecord or None, not {parts or type(found).__name__}"
    )


def _usable(replies: list[Message]) -> bool:
    """Tell whether any client answered and had something to train on.

    Flower's own strategies divide by the sum of the weights.
    """
    for reply in replies:
        if reply.has_content():
            metrics = next(iter(reply.content.metric_records.values()))
            if metrics[flower.NUM_EXAMPLES]:
                return True
    return False


def _accept(round: int, new: ArrayRecord, old: ArrayRecord) -> ArrayRecord:
    """Return the strategy's new model, or the old one where that isn't finite."""
    lost = [name for name in old if name not in new]
    if lost:
        raise EngineError(
            f"round {round}: the strategy's new model lacks {lost[0]}: the clients keep it to "
            "themselves, and this strategy needs all arrays from them"
        )
    for name in new:
        if name not in old or new[name].shape != old[name].shape:
            what = (
                f"an array {name}, which the model doesn't have"
                if name not in old
                else f"{name} of shape {list(new[name].shape)}, but the model's is "
                f"{list(old[name].shape)}"
            )
            raise EngineError(
                f"round {round}: the strategy's new model has {what}; what clients upload in the "
                "group 'arrays' must be called and shaped as in the global model. More arrays for "
                "the clients are added to it by the client update's initial()"
            )
    for name, array in flower.from_record(new).items():
        if not np.isfinite(array).all():
            warnings.warn(
                f"round {round}: the strategy's new {name} isn't finite (NaN or inf); "
                "the model stays as it was",
                stacklevel=3,
            )
            return old
    return new


def _tell_failures(round: int, failures: dict[int, str], asked: int) -> None:
    """Warn of clients that failed.

    Raises
    ------
    EngineError
        If in the first round all of several have: that is the method's fault, not theirs.
    """
    if not failures:
        return
    shown = [f"client {k}: {why}" for k, why in sorted(failures.items())[:FAILURES_SHOWN]]
    more = len(failures) - len(shown)
    whose = f"{'; '.join(shown)}{f'; and {more} more' if more else ''}"
    if round == 1 and 1 < asked == len(failures):
        raise EngineError(f"round 1: all {asked} clients failed: {whose}")
    warnings.warn(
        f"round {round}: {len(failures)} of {asked} clients failed and are left out: {whose}",
        stacklevel=3,
    )


def _evaluate(
    strategy: Strategy, grid: SimulatedGrid, arrays: ArrayRecord, round: int, seed: int
) -> tuple[dict[str, dict[str, float]], pd.DataFrame]:
    """Test the model on the global test set, and on the clients that the strategy chooses."""
    grid.evaluated = pd.DataFrame()
    with flower.quiet_log():
        with flower.seeded_draws(seed, "configure_evaluate", round):
            messages = _messages(strategy, "configure_evaluate", round, arrays, grid)
        if messages:
            replies = grid.send_and_receive(messages)
            with flower.seeded_draws(seed, "aggregate_evaluate", round):
                strategy.aggregate_evaluate(round, replies)
    return grid.test(arrays), grid.evaluated


def _figures(generic: dict[str, dict[str, float]], clients: pd.DataFrame) -> dict[str, float]:
    """Return the accuracies of all views, as columns of rounds.csv.

    Of a generic view those on the global test set, of a personal one the means over the clients.
    The personal accuracy of a method without personal models is that of its generic one.
    """
    figures: dict[str, float] = {}
    for view, metrics in generic.items():
        figures |= {column(view, group): metrics[measure] for group, measure in MEASURES.items()}
    if clients.empty:
        return figures
    for view in clients["view"].unique():
        if view.startswith("personal"):
            means = clients.loc[clients["view"] == view, list(MEASURES.values())].mean()
            figures |= {column(view, group): float(means[m]) for group, m in MEASURES.items()}
    if "personal_accuracy" not in figures:
        first = clients["view"] == clients["view"].iloc[0]
        figures["personal_accuracy"] = float(clients.loc[first, "accuracy"].mean())
    return figures


def _row(
    round: int, grid: SimulatedGrid, figures: dict[str, float], seconds: float
) -> dict[str, Any]:
    report = grid.report
    nan = float("nan")
    always = [column("generic"), column("personal"), *(column("generic", g) for g in GROUPS)]
    of_views = [column(view, group) for view in grid.views for group in MEASURES]
    return {
        "round": round,
        **{name: figures.get(name, nan) for name in always},
        **{name: figures.get(name, nan) for name in of_views if name not in always},
        "train_loss": _train_loss(report.metrics),
        "clients": len(report.clients),
        "failures": len(report.failures),
        "bytes_up": report.bytes_up,
        "bytes_down": report.bytes_down,
        "seconds": seconds,
    }


def _train_loss(metrics: Mapping[str, Sequence[float]]) -> float:
    """Return the clients' mean training loss, weighted by their examples; NaN without any."""
    if "train_loss" not in metrics:
        return float("nan")
    loss = np.array(metrics["train_loss"], dtype=float)
    weights = np.array(metrics["num_examples"], dtype=float)
    trained = (weights > 0) & ~np.isnan(loss)
    if not trained.any():
        return float("nan")
    return float(np.average(loss[trained], weights=weights[trained]))
