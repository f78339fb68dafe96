"""How near a round comes to the bare steps of SGD that it consists of.

    python -m experiments.benchmarks.limit --workload w1

runs a workload of `experiments.benchmarks.workloads` in fedsim on two workers, as bare steps, and
as a plain loop over the clients, all with one thread a process.

The bare steps are the limit: two processes each take half of a cohort's steps, round after round,
with nothing around: weights and inputs with channels innermost and ready in memory, an
``nn.Module``, ``torch.autograd.grad`` and one ``foreach`` update. Of FedLabel both passes count,
with the forward passes of both teachers; the inputs are augmented beforehand, and fedsim does that
in the round. Of FedLoGe one step trains through all three heads.

The plain loop is one process that copies the model for each client, trains it with
``torch.optim.SGD`` on the same prepared batches, and averages the copies.

They take turns round by round. The ratio is fedsim's time a round over the bare steps' next to it:
at most 1.15 is the aim for w1, 1.2 for fedlabel and fedloge.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.benchmarks import harness
from experiments.benchmarks.harness import Measured, Stopwatch
from experiments.benchmarks.workloads import WORKLOADS, workload
from fedsim.simulation import load_federation, make_task

PROCESSES = 2


@dataclass(frozen=True, slots=True)
class Data:
    """A client's batches: (inputs, labels), and (inputs, strongly augmented inputs)."""

    labelled: list[tuple[Tensor, Tensor]]
    unlabelled: list[tuple[Tensor, Tensor]]


Descend = Callable[[nn.Module, Tensor], None]
"""Takes a step down a loss."""


# ----- what a client does: the models that it trains, its data, and how it takes a step ----------


def fedavg(w: nn.Module, own: Sequence[nn.Module], data: Data, descend: Descend) -> None:
    """Train one model on the labelled examples."""
    for x, y in data.labelled:
        descend(own[0], F.cross_entropy(own[0](x), y))


def fedloge(w: nn.Module, own: Sequence[nn.Module], data: Data, descend: Descend) -> None:
    """Train the backbone through the fixed head, and two heads on its features."""
    for x, y in data.labelled:
        fixed, shared, personal = (F.cross_entropy(logits, y) for logits in own[0](x))
        descend(own[0], fixed + shared + personal)


def fedlabel(w: nn.Module, own: Sequence[nn.Module], data: Data, descend: Descend) -> None:
    """Train a labelled model, and an unlabelled one on what it and the global model say."""
    local, mine = own
    fedavg(w, own, data, descend)
    for x, strong in data.unlabelled:
        with torch.no_grad():
            p_l, p_g = local(x).softmax(1), w(x).softmax(1)
            h_l, h_g = p_l.var(1, unbiased=False), p_g.var(1, unbiased=False)
            confidence, label = torch.where((h_l >= h_g)[:, None], p_l, p_g).max(1)
            kept = (confidence > 0).float()
            agreed = kept * (p_l.argmax(1) == p_g.argmax(1))
            rho = torch.minimum(h_l, h_g) / torch.maximum(h_l, h_g)
        pseudo = F.cross_entropy(mine(strong), label, reduction="none")
        divergence = F.kl_div(mine(x).log_softmax(1), p_l, reduction="none").sum(1)
        weights = zip(mine.parameters(), w.parameters(), strict=True)
        near = [(a - b.detach()).square().mean() for a, b in weights]
        loss = (pseudo * kept).sum() / kept.sum().clamp(min=1)
        loss = loss + 0.05 * (rho * divergence * agreed).sum() / agreed.sum().clamp(min=1)
        descend(mine, loss + 10 * torch.stack(near).sum())


Train = Callable[[nn.Module, Sequence[nn.Module], Data, Descend], None]

METHODS: dict[str, tuple[Train, int]] = {
    "fedavg": (fedavg, 1),
    "fedloge": (fedloge, 1),
    "fedlabel": (fedlabel, 2),
}
"""Method -> what its client does, and how many models that trains."""


class ThreeHeads(nn.Module):
    """FedLoGe's model."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.personal = deepcopy(head)
        self.etf: Tensor
        self.register_buffer("etf", 0.1 * F.normalize(torch.randn_like(head.weight)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of the fixed, the global and the personal head."""
        f = self.backbone(x)
        return F.linear(f, self.etf), self.head(f.detach()), self.personal(f.detach())


# ----- the two references ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """A workload, ready in memory."""

    train: Train
    trained: int
    model: nn.Module
    clients: list[Data]
    lr: float


def prepare(name: str, layout: torch.memory_format) -> Work:
    """Return a workload's model and a cohort's batches, with images in a layout."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = workload(name, rounds=1)
    federation = load_federation(work)
    source = federation.source
    trailing = (1,) * (source.x_train.ndim - 2)
    mean, std = (torch.tensor(a).view(-1, *trailing) for a in source.normalisation())

    def batches(index: NDArray[Any]) -> list[tuple[Tensor, Tensor]]:
        x = (torch.from_numpy(source.x_train[index]).float() - mean) / std
        y = torch.from_numpy(source.y_train[index])
        size = work.training.batch_size
        starts = range(0, len(y), size)
        return [(_laid_out(x[i : i + size], layout), y[i : i + size]) for i in starts]

    clients = [
        Data(
            batches(federation.labelled(client)),
            [(x, _laid_out(x.flip(-1), layout)) for x, _ in batches(federation.unlabelled(client))],
        )
        for client in range(int(work.training.participation))
    ]
    made = make_task(work, federation, Path("unused")).model()
    model: nn.Module = made
    if work.method.name == "fedloge":
        model = ThreeHeads(made.backbone, made.head)
    for parameter in model.parameters():
        parameter.data = _laid_out(parameter.detach(), layout)
    train, trained = METHODS[work.method.name]
    return Work(train, trained, model, clients, work.training.lr)


def _laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    # A copy of its own, not a part of a larger tensor; vectors have no layout.
    return x.clone(memory_format=layout if x.dim() == 4 else torch.contiguous_format)


def run_bare(name: str, rounds: int) -> Measured:
    """Take a cohort's steps with nothing around, shared out between the processes."""
    work = prepare(name, torch.channels_last)
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(PROCESSES)
    others = [
        fork.Process(target=_take_steps, args=(work, rounds, share, barrier))
        for share in range(1, PROCESSES)
    ]
    for process in others:
        process.start()
    watch = Stopwatch()
    _take_steps(work, rounds, 0, barrier, watch)
    memory = harness.pss_mib()
    barrier.wait()
    for process in others:
        process.join()
    return _measured(watch, memory)


def _measured(watch: Stopwatch, memory: float) -> Measured:
    return Measured(
        ends=watch.ends, begins=watch.begins, pss_mib=memory, peak_mib=harness.peak_mib()
    )


def _take_steps(
    work: Work, rounds: int, share: int, barrier: Any, watch: Stopwatch | None = None
) -> None:
    own = [deepcopy(work.model) for _ in range(work.trained)]
    parameters: dict[nn.Module, list[Tensor]] = {model: [*model.parameters()] for model in own}
    start = [parameter.detach() for parameter in work.model.parameters()]

    def descend(model: nn.Module, loss: Tensor) -> None:
        gradient = torch.autograd.grad(loss, parameters[model])
        with torch.no_grad():
            torch._foreach_add_(parameters[model], gradient, alpha=-work.lr)

    for done in range(1, rounds + 1):
        # Once a round, so that the weights stay what a client has.
        with torch.no_grad():
            for model in own:
                torch._foreach_copy_(parameters[model], start)
        for client in work.clients[share::PROCESSES]:
            work.train(work.model, own, client, descend)
        barrier.wait()
        if watch is not None:
            watch.lap(last=done == rounds)
        barrier.wait()  # the others begin when this one does
    if share:
        barrier.wait()  # until the memory is measured


def run_loop(name: str, rounds: int) -> Measured:
    """Train the clients one after the other in this process, each on a copy of the model."""
    work = prepare(name, torch.contiguous_format)
    optimizers: dict[nn.Module, torch.optim.SGD] = {}

    def descend(model: nn.Module, loss: Tensor) -> None:
        optimizers[model].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizers[model].step()

    watch = Stopwatch()
    for done in range(1, rounds + 1):
        copies: list[dict[str, Tensor]] = []
        for client in work.clients:
            own = [deepcopy(work.model) for _ in range(work.trained)]
            optimizers.clear()
            optimizers |= {m: torch.optim.SGD(m.parameters(), lr=work.lr) for m in own}
            work.train(work.model, own, client, descend)
            copies += [model.state_dict() for model in own]
        mean = {key: torch.stack([copy[key] for copy in copies]).mean(0) for key in copies[0]}
        work.model.load_state_dict(mean)
        watch.lap(last=done == rounds)
    return _measured(watch, harness.pss_mib())


def main() -> None:
    """Run the benchmark of the command line."""
    parser = harness.parser(__doc__, rounds=40)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    args = harness.parse(parser)
    same = {"name": args.workload, "rounds": args.rounds}
    variants = [
        harness.of_fedsim("fedsim", workload(args.workload, args.rounds)),
        harness.Variant(name="bare steps, 2 processes", run=run_bare, arguments=same),
        harness.Variant(name="plain loop, 1 process", run=run_loop, arguments=same),
    ]
    rows = harness.take_turns(variants, args.repeats, harness.measure_together)
    columns = {
        **harness.SECONDS,
        "/ bare": lambda row: f"{harness.ratio_by_round(row, rows[1]):.2f}",
    }
    title = f"{args.workload} against its bare steps"
    harness.report(title, args, rows, columns, harness.ratio_by_round(rows[0], rows[1]))


if __name__ == "__main__":
    main()
