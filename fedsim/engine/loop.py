"""The round loop: what a Flower strategy's ``start`` does, with records and reproducible draws."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedsim.data.class_groups import GROUPS
from fedsim.engine import flower
from fedsim.engine.broadcast import Broadcast
from fedsim.engine.clock import Clock
from fedsim.engine.grid import SimulatedGrid
from fedsim.engine.replies import TrainReport
from fedsim.errors import EngineError, UserError, described
from fedsim.metrics import accuracy_column, client_mean

REASONS_SHOWN = CLIENTS_SHOWN = 3
"""Reasons for failures that a round's warning says, and clients that it names with each."""

MEASURES = {"": "accuracy"} | {group: f"{group}_accuracy" for group in GROUPS}
"""Group of classes, or all of them -> the metric of a view; see `accuracy_column`."""


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
    metrics : list of dict
        The rows of ``metrics.csv``: what the strategy has returned besides the model.
    seconds : dict
        Where the time went, by part.
    arrays : ArrayRecord
        The global model after the round.
    """

    row: dict[str, Any]
    training: dict[str, list[Any]]
    clients: pd.DataFrame | None
    metrics: list[dict[str, Any]]
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
    grid.weighted_by = flower.weights_of(strategy)
    grid.mean_of_tests = flower.takes_mean_of_tests(strategy)
    for round in range(finished + 1, rounds + 1):
        clock = Clock()
        with flower.quiet_log():
            with flower.seeded_draws(seed, "configure_train", round):
                messages = _messages(strategy, "configure_train", round, arrays, grid)
            clock.lap("configure")
            grid.report = TrainReport()
            replies = _with_examples(grid.send_and_receive(messages))
            clock.lap("train")
            _split(clock.seconds, "train", grid.report.seconds)
            _tell_failures(round, grid.report.failures, len(messages))
            with flower.seeded_draws(seed, "aggregate_train", round):
                usable = any(reply.has_content() for reply in replies)
                new, said = _aggregate(strategy, round, replies) if usable else (None, None)
        metrics = _metric_rows(round, "train", said)
        if new is not None:
            arrays = _accept(round, new, arrays)
        elif usable:
            _tell_unchanged(round, "the strategy returned no model")
        elif messages:
            _tell_unchanged(round, "no client had anything to average")
        else:
            _tell_unchanged(round, "the strategy chose no client")
        clock.lap("aggregate")
        figures: dict[str, float] = {}
        clients: pd.DataFrame | None = None
        if round % evaluate_every == 0 or round == rounds:
            clients, said = _evaluate(strategy, grid, arrays, round, seed)
            metrics += _metric_rows(round, "evaluate", said)
            figures = _figures(grid.generic_metrics(arrays), clients)
            clock.lap("evaluate")
        row = _row(round, grid, figures, sum(clock.seconds.values()))
        yield Round(row, grid.report.metrics, clients, metrics, clock.seconds, arrays)


def _tell_unchanged(round: int, why: str) -> None:
    warnings.warn(f"round {round}: {why}; the model stays as it was", stacklevel=3)


@contextmanager
def _blamed_on(strategy: Strategy, method: str, round: int) -> Iterator[None]:
    """Turn whatever a strategy raises into an EngineError that says where."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise EngineError(
            f"round {round}: {type(strategy).__name__}.{method}: {described(error)}"
        ) from error


def _messages(
    strategy: Strategy, configure: str, round: int, arrays: ArrayRecord, grid: SimulatedGrid
) -> Sequence[Message]:
    """Return a round's messages such that they can be counted: what is yielded is drawn at once."""
    with _blamed_on(strategy, configure, round):
        found: Any = getattr(strategy, configure)(round, arrays, ConfigRecord(), grid)
        if isinstance(found, Broadcast):
            return found
        messages = list(found) if isinstance(found, Iterable) else [found]
        for one in messages:
            if not isinstance(one, Message):
                raise TypeError(f"must return messages, not {type(one).__name__}")
        return messages


def _split(seconds: dict[str, float], part: str, of_part: dict[str, float]) -> None:
    """Put the parts of a part in its place; the rest of it is the making of messages."""
    seconds["messages"] = seconds.pop(part) - sum(of_part.values())
    seconds |= of_part


def _aggregate(
    strategy: Strategy, round: int, replies: list[Message]
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    with _blamed_on(strategy, "aggregate_train", round):
        try:
            found: Any = strategy.aggregate_train(round, replies)
        except (flower.FlowerError, KeyError) as error:
            # Flower's strategies refuse replies of another form than theirs, ours miss a group.
            why = described(error)
            is_own = isinstance(error, KeyError) and why.endswith(")")  # it names the user's file
            hint = "" if is_own else "; do method.name and method.client belong together?"
            raise EngineError(
                f"round {round}: {type(strategy).__name__} can't average what the clients upload "
                f"({why}){hint}"
            ) from error
    match found:
        case (None | ArrayRecord() as new, None | MetricRecord() as metrics):
            return new, metrics
    parts = ", ".join(type(one).__name__ for one in found) if isinstance(found, tuple) else None
    raise EngineError(
        f"round {round}: {type(strategy).__name__}.aggregate_train must return an ArrayRecord or "
        f"None, and a MetricRecord or None, not {parts or type(found).__name__}"
    )


def _metric_rows(round: int, phase: str, metrics: MetricRecord | None) -> list[dict[str, Any]]:
    """Return what a strategy has returned besides the model, a number a row."""
    rows = []
    for name, value in (metrics or {}).items():
        numbers = (
            {f"{name}[{place}]": one for place, one in enumerate(value)}
            if isinstance(value, list)
            else {name: value}
        )
        rows += [
            {
                "round": round,
                "phase": phase,
                "metric": " ".join(metric.split()),
                "value": float(number),
            }
            for metric, number in numbers.items()
        ]
    return rows


def _with_examples(replies: Iterable[Message]) -> list[Message]:
    """Return the errors and the answers of clients that had something to train on.

    Of the others there is only the model that was sent to them: weighted means leave it out, but a
    median, say, would be drawn to it.
    """
    return [
        reply
        for reply in replies
        if not reply.has_content()
        or next(iter(reply.content.metric_records.values()))[flower.NUM_EXAMPLES]
    ]


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
        if "float" in old[name].dtype and "float" not in new[name].dtype:
            raise EngineError(
                f"round {round}: the strategy's new {name} is of {new[name].dtype}; the model's is "
                f"of {old[name].dtype}, and would lose its fractions"
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
    by_reason: dict[str, list[int]] = {}
    for client in sorted(failures):
        by_reason.setdefault(failures[client], []).append(client)
    shown = [f"{_named(clients)}: {why}" for why, clients in by_reason.items()]
    more = len(shown) - REASONS_SHOWN
    whose = "; ".join(shown[:REASONS_SHOWN]) + (
        f"; and {more} more reason{'s' * (more > 1)}" if more > 0 else ""
    )
    if round == 1 and 1 < asked == len(failures):
        raise EngineError(f"round 1: all {asked} clients failed: {whose}")
    warnings.warn(
        f"round {round}: {len(failures)} of {asked} clients failed and are left out: {whose}",
        stacklevel=3,
    )


def _named(clients: Sequence[int]) -> str:
    """Name the first of some clients.

    >>> _named([4]), _named([0, 2, 5]), _named(range(9))
    ('client 4', 'clients 0, 2, 5', 'clients 0, 1, 2 and 6 more')
    """
    first = ", ".join(map(str, clients[:CLIENTS_SHOWN]))
    more = len(clients) - CLIENTS_SHOWN
    return f"client{'s' * (len(clients) > 1)} {first}" + (f" and {more} more" if more > 0 else "")


def _evaluate(
    strategy: Strategy, grid: SimulatedGrid, arrays: ArrayRecord, round: int, seed: int
) -> tuple[pd.DataFrame, MetricRecord | None]:
    """Test the model on the clients that the strategy chooses; return what it says of that, too."""
    grid.evaluated = pd.DataFrame()
    said: Any = None
    with flower.quiet_log():
        with flower.seeded_draws(seed, "configure_evaluate", round):
            messages = _messages(strategy, "configure_evaluate", round, arrays, grid)
        if messages:
            replies = grid.send_and_receive(messages)
            with (
                flower.seeded_draws(seed, "aggregate_evaluate", round),
                _blamed_on(strategy, "aggregate_evaluate", round),
            ):
                said = strategy.aggregate_evaluate(round, replies)
                if not isinstance(said, MetricRecord | None):
                    what = type(said).__name__
                    raise TypeError(f"must return a MetricRecord or None, not {what}")
    return grid.evaluated, said


def _figures(generic: dict[str, dict[str, float]], clients: pd.DataFrame) -> dict[str, float]:
    """Return the accuracies of all views, as columns of rounds.csv.

    Of a generic view those on the global test set, of a personal one the means over the clients.
    The personal accuracy of a method without personal models is that of its generic one.
    """
    figures: dict[str, float] = {}
    for view, metrics in generic.items():
        figures |= {
            accuracy_column(view, group): metrics[measure] for group, measure in MEASURES.items()
        }
    if clients.empty:
        return figures
    for view in clients["view"].unique():
        if view.startswith("personal"):
            means = clients.loc[clients["view"] == view, list(MEASURES.values())].mean()
            figures |= {
                accuracy_column(view, group): float(means[m]) for group, m in MEASURES.items()
            }
    if "personal_accuracy" not in figures:
        first = clients["view"] == clients["view"].iloc[0]
        figures["personal_accuracy"] = float(clients.loc[first, "accuracy"].mean())
    return figures


def _row(
    round: int, grid: SimulatedGrid, figures: dict[str, float], seconds: float
) -> dict[str, Any]:
    report = grid.report
    nan = float("nan")
    always = [
        accuracy_column("generic"),
        accuracy_column("personal"),
        *(accuracy_column("generic", g) for g in GROUPS),
    ]
    of_views = [accuracy_column(view, group) for view in grid.views for group in MEASURES]
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
    return client_mean(metrics["train_loss"], metrics["num_examples"])
