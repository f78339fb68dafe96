"""Carries client updates out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.data.federation import Federation
from fedsim.data.statistics import Statistics
from fedsim.data.transfer import to_device
from fedsim.engine.clock import Clock
from fedsim.engine.loader import PREDICT_BLOCK, Loader
from fedsim.engine.requests import SGD, AddUp, Batch, Examples, Predict, Request
from fedsim.engine.sgd import Pass, PassContext, alike, code_of, run_alone, run_stacked
from fedsim.engine.step import tf32
from fedsim.engine.tally import Counts
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Client, ClientUpdate, Config, Upload
from fedsim.errors import EngineError
from fedsim.models.net import Net, Weights
from fedsim.rng import Generators


@dataclass(slots=True)
class _Progress:
    """One client's update under way."""

    client: int
    requests: Generator[Request, Any, Any]
    passes: int = 0
    counts: Counts = field(default_factory=dict)
    answer: Any = None
    result: Any = None
    error: Exception | None = None


def _failure(error: Exception | SystemExit) -> Exception:
    if isinstance(error, SystemExit):
        return RuntimeError(f"it called sys.exit({error.code!r})")
    return error


def _why_not_stacked(failure: Exception) -> str:
    """Return why passes can't run side by side; ``vmap`` says it in terms of its own."""
    text = f"{failure}"
    for said, meant in (
        ("data-dependent control flow", "a Python branch on a tensor's numbers; use torch.where"),
        (".item()", "a number is taken out of a tensor"),
        ("random operation", "random numbers are drawn"),
        ("does not require grad", "it calls torch.autograd; use torch.func.grad"),
    ):
        if said in text:
            return meant
    return text


def _steps(
    name: str, ask: Callable[[Weights, Client], Any], w: Weights, client: Client
) -> Generator[Request, Any, Any]:
    """Start what asks for passes at its first request: one that fails at once fails alone."""
    steps = ask(w, client)
    if not isinstance(steps, Generator):
        raise TypeError(
            f"{name} must be a generator: ask for passes with `yield from sgd(...)`, or put a "
            "`yield` after its return"
        )
    return (yield from steps)


@contextmanager
def unchanged(method: ClientUpdate, w: Weights) -> Iterator[None]:
    """Make sure that a method leaves the global weights as they are.

    Raises
    ------
    EngineError
        If it has changed some in place: the next client would start from those.
    """
    before = [tensor._version for tensor in w.values()]
    yield
    changed = [n for (n, t), was in zip(w.items(), before, strict=True) if t._version != was]
    if changed:
        raise EngineError(
            f"{type(method).__name__} changes the global {changed[0]} in place, which all clients "
            "share; let it change a copy, such as w[name].clone()"
        )


class LocalTrainer:
    """Runs the client updates of one process, clients one by one or side by side.

    Parameters
    ----------
    net : Net
        The model.
    federation : Federation
        The data; may be backed by read-only shared memory.
    statistics : Statistics
        Of its training data.
    training : LocalTraining
        How to train.
    seed : int
        The experiment's seed.
    stacked : bool
        Whether the passes of several clients run side by side; the numbers are the same up to
        rounding.
    device : str or torch.device
        Where to train and test; all weights given and returned are there.
    """

    def __init__(
        self,
        net: Net,
        federation: Federation,
        statistics: Statistics,
        training: LocalTraining,
        seed: int,
        stacked: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        self.stacked = stacked
        self.device = torch.device(device)
        self.net = net
        self.federation = federation
        self.training = training
        self.seed = seed
        self._generators = Generators(seed, round=0, clients=())
        self.max_stack: int | None = None
        """How many clients to train side by side at most, once more of them have not fitted."""
        self._num_clients = 0
        self._warned_of_own_functions = False
        self.clock = Clock()
        """Where the time of the updates goes; the owner reads it and starts it anew."""
        self.loader = Loader(
            federation, statistics, training.batch_size, training.augmentation, self.device
        )
        groups = torch.tensor(statistics.groups, device=self.device)
        rate = torch.zeros((), device=self.device)
        self._context = PassContext(net, self.loader, training, groups, self.clock, rate)

    @property
    def graphs_failed(self) -> bool:
        """Whether steps are begun operation by operation on a GPU, for a capture has failed."""
        return self._context.tapes.graphs_failed

    def clients(
        self, round: int, clients: Sequence[int], configs: Sequence[Config] | None = None
    ) -> list[Client]:
        """Return clients as a client update sees them, without anything kept.

        ``configs`` are what each is told; nothing by default.

        All are looked up together, which takes little longer than one of them.
        """
        self._generators = Generators(self.seed, round=round, clients=clients)
        training = self.training.in_round(round)
        counts = self.federation.labelled_class_counts(clients)
        trainable = tuple(sorted(self.net.trainable))
        by_class = to_device(counts.astype(np.float32), self.device).unbind()
        return [
            Client(
                client,
                round,
                Examples(labelled, True),
                Examples(unlabelled, False),
                of_client,
                training=training,
                seed=self.seed,
                trainable=trainable,
                config=config,
            )
            for client, (labelled, unlabelled), of_client, config in zip(
                clients,
                self.federation.labelled_and_unlabelled(clients),
                by_class,
                configs or [Config({})] * len(clients),
                strict=True,
            )
        ]

    def update(
        self,
        method: ClientUpdate,
        w: Weights,
        client: int,
        round: int,
        state: Weights | None = None,
    ) -> tuple[Upload, Counts]:
        """Run ``method``'s update of one client: `update_all` of one, which raises its error."""
        (me,) = self.clients(round, [client])
        (found,) = self.update_all(method, w, [replace(me, state=state or {})])
        if isinstance(found, Exception):
            raise found
        return found

    def update_all(
        self,
        method: ClientUpdate,
        w: Weights,
        clients: Sequence[Client],
    ) -> list[tuple[Upload, Counts] | Exception]:
        """Run ``method``'s update of some clients from the global weights ``w``.

        Parameters
        ----------
        method : ClientUpdate
            What to do.
        w : Weights
            The round's global weights; not changed.
        clients : sequence of Client
            In the same round, see `clients`; what they kept is not changed.

        Returns
        -------
        list of (Upload, dict) or Exception
            What each client sends and keeps, and how good its pseudo-labels were, which neither
            client nor server can know (`fedsim.engine.tally.audit`); or why it failed.
        """
        # Each has a dict of its own; the tensors in it are everybody's.
        steps = [_steps("update", method.update, dict(w), client) for client in clients]
        runs = self._drive(method, w, clients, steps, "pass")
        return [run.error or (run.result, run.counts) for run in runs]

    def _drive(
        self,
        method: ClientUpdate,
        w: Weights,
        clients: Sequence[Client],
        steps: Sequence[Generator[Request, Any, Any]],
        purpose: str,
    ) -> list[_Progress]:
        """Carry out what is asked for some clients, until each has its result or has failed."""
        self._num_clients = len(clients)
        runs = [
            _Progress(client.id, of_client)
            for client, of_client in zip(clients, steps, strict=True)
        ]
        if runs:
            with unchanged(method, w), torch.random.fork_rng(devices=[]):
                stacked = self.stacked and method.stackable
                self._go_on(runs, purpose, clients[0].round, stacked)
        return runs

    def _go_on(self, runs: list[_Progress], purpose: str, round: int, stacked: bool) -> None:
        while runs:
            asked: list[tuple[_Progress, Request]] = []
            for run in runs:
                try:
                    request = run.requests.send(run.answer)
                    if not isinstance(request, Request):
                        raise TypeError(
                            f"it yields {type(request).__name__}: write `yield from sgd(...)`, "
                            "predict(...) or add_up(...)"
                        )
                    asked.append((run, request))
                except StopIteration as finished:
                    run.result = finished.value
                except (Exception, SystemExit) as error:  # its failure must not end the others
                    run.error = _failure(error)
            groups: dict[Any, list[tuple[_Progress, Request]]] = {}
            for run, request in asked:
                key: Any = run.client
                if stacked and isinstance(request, SGD):
                    key = alike(request)
                groups.setdefault(key, []).append((run, request))
            self._warn_of_own_functions(groups)
            for group in groups.values():
                self._answer(group, purpose, round)
            runs = [run for run, _ in asked if run.error is None]

    def _warn_of_own_functions(self, groups: Mapping[Any, Sequence[Any]]) -> None:
        """Warn, once, where clients have losses of their own, which are the same text."""
        alone = {
            key[0] for key, group in groups.items() if isinstance(key, tuple) and len(group) == 1
        }
        texts = {code_of(loss) for loss in alone}
        if len(alone) > len(texts) and not self._warned_of_own_functions:
            self._warned_of_own_functions = True
            warnings.warn(
                "clients go one by one, for each has a loss of its own (a function inside update, "
                "or a lambda); make it a method, and give it a client's tensors by given=",
                stacklevel=2,
            )

    def _answer(self, group: list[tuple[_Progress, Request]], purpose: str, round: int) -> None:
        """Carry out one client's request, or the passes of several side by side."""
        failure = self._try(group, purpose, round)
        if failure is None:
            return
        if len(group) == 1:
            group[0][0].error = failure
            return
        # What the failed pass still holds would be in the way of the next ones.
        failure.__traceback__ = failure.__context__ = None
        if isinstance(failure, torch.OutOfMemoryError):
            warnings.warn(f"{len(group)} clients don't fit side by side: in halves", stacklevel=2)
            half = len(group) // 2
            # They need not be all whose arrays are here.
            self.max_stack = max(half, (self.max_stack or self._num_clients) // 2)
            self._answer(group[:half], purpose, round)
            self._answer(group[half:], purpose, round)
            return
        # Whose failure it is shows when each goes alone.
        for one in group:
            self._answer([one], purpose, round)
        if not any(run.error for run, _ in group):
            self.stacked = False
            warnings.warn(
                f"clients go one by one, for their passes can't run side by side: "
                f"{_why_not_stacked(failure)}; "
                "stackable = False in the client update says so beforehand",
                stacklevel=2,
            )

    def _try(
        self, group: list[tuple[_Progress, Request]], purpose: str, round: int
    ) -> Exception | None:
        """Carry requests out, or return why that failed."""
        try:
            first, request = group[0]
            if isinstance(request, Predict):
                first.answer = self._predict(request)
                return None
            if isinstance(request, AddUp):
                first.answer = self._add_up(request)
                return None
            passes = self._passes(group, purpose, round)
            self.clock.lap("train")  # predictions, and the methods' own steps
            with tf32(self.training.precision == "tf32"):
                if len(passes) > 1:
                    found = run_stacked(self._context, passes, round, first.passes)
                else:
                    self._seed_chance(passes[0])
                    found = [run_alone(self._context, passes[0])]
        except (Exception, SystemExit) as error:  # its failure must not end the others
            return _failure(error)
        for (run, _), (trained, counts) in zip(group, found, strict=True):
            run.answer = trained
            run.passes += 1
            for name, count in counts.items():
                run.counts[name] = run.counts.get(name, 0.0) + count
        return None

    def _seed_chance(self, one: Pass) -> None:
        """Seed PyTorch, from which layers such as Dropout draw; ``vmap`` refuses them.

        By the state of the pass's own random numbers: to make others would take longer.
        """
        _, (rng, *_) = one
        seed = rng.bit_generator.state["state"]["state"] % 2**63
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _passes(
        self, group: list[tuple[_Progress, Request]], purpose: str, round: int
    ) -> list[Pass]:
        """Return requests with random numbers of their own for each kind of their examples."""
        asked = [(run, request) for run, request in group if isinstance(request, SGD)]
        assert len(asked) == len(group), "predictions have no random numbers"
        if self._generators.round != round:
            self._generators = Generators(self.seed, round=round, clients=())
        lr = self.training.in_round(round).lr if self.training.is_scheduled else None
        if lr is not None:
            asked = [
                (run, replace(request, lr=lr) if request.lr is None else request)
                for run, request in asked
            ]
        if self.device.type != "cpu":  # a number on the processor fits alone, but not in a stack
            asked = [
                (
                    run,
                    replace(
                        request,
                        given=tuple(map(self._here, request.given)),
                        correction=self._here(request.correction),
                    ),
                )
                for run, request in asked
            ]
        return [
            (
                request,
                [
                    self._generators.of(f"{purpose} {run.passes}.{kind}", run.client)
                    for kind in range(len(request.kinds))
                ],
            )
            for run, request in asked
        ]

    def _here(self, w: Weights) -> Weights:
        return {name: tensor.to(self.device) for name, tensor in w.items()}

    @torch.no_grad()
    @tf32(False)
    def _predict(self, request: Predict) -> Tensor:
        w, *given = (self.net.with_own_buffers(one) for one in (request.w, *request.given))
        return torch.cat(
            [
                request.function(self.net, w, self.loader.inputs(some), *given)
                for some in request.examples.in_blocks(PREDICT_BLOCK)
            ]
        )

    @torch.no_grad()
    @tf32(False)
    def _add_up(self, request: AddUp) -> dict[str, Tensor]:
        w, *given = (self.net.with_own_buffers(one) for one in (request.w, *request.given))
        sums: dict[str, Tensor] = {}
        for some in request.examples.in_blocks(PREDICT_BLOCK):
            y = self.loader.train.labels(some.index)
            y = y if some.labelled else torch.full_like(y, -1)
            mask = torch.ones(len(some), device=self.device)
            batch = Batch(self.loader.inputs(some), y, mask, padded=False)
            found: Any = request.function(self.net, w, batch, *given)
            tensors = found.values() if isinstance(found, dict) else [None]
            if not all(isinstance(one, Tensor) for one in tensors):
                raise TypeError("what is added up must be a dict of tensors")
            for name, tensor in found.items():
                # What a mean over no examples is, says nothing.
                one = tensor if len(some) else torch.zeros_like(tensor)
                sums[name] = sums[name] + one if name in sums else one
        return sums

    def personalise(self, method: ClientUpdate, w: Weights, client: Client) -> Weights:
        """Return a client's personal weights: `personalise_all` of one, which raises its error."""
        (made,) = self.personalise_all(method, w, [client])
        if isinstance(made, Exception):
            raise made
        return made

    def personalise_all(
        self, method: ClientUpdate, w: Weights, clients: Sequence[Client]
    ) -> list[Weights | Exception]:
        """Return what ``method`` makes of the global weights for some clients, or why it failed.

        Parameters
        ----------
        method, w, clients
            As for `update_all`; ``w`` are those after the clients' round.
        """
        steps = [_steps("personalise", method.personalise, dict(w), client) for client in clients]
        runs = self._drive(method, w, clients, steps, "personalise")
        return [run.error or run.result for run in runs]
