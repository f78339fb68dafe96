"""A round of residual networks on one device: clients side by side against a plain loop over them.

    python -m experiments.benchmarks.gpu --device cuda --precision bfloat16

trains cohorts on made-up images of 32 x 32 pixels and 100 classes, for each model, batch size and
number of clients. It needs PyTorch and NumPy only. A round is the training of all clients, each
from the global weights, and their mean.

side by side
    fedsim's stacked training, as many clients at a time as fit into ``--memory`` (see
    `fedsim.engine.memory`); ``--precision`` is ``training.precision``. Convolutions are those of
    `fedsim.models.kernels`, but in float32 and with ``--convolutions grouped`` the library's
    grouped ones, into which ``vmap`` turns them. Two rounds come first and aren't counted.
plain loop
    For each client a copy of the ``nn.Module`` and ``torch.optim.SGD``, on batches that lie ready
    on the device; in bfloat16 under autocast. One round, after one client's.

The numbers are checked against fedsim's own training in float32, one client after the other: the
mean of the clients' first steps may differ by no more than ``TOLERANCE`` of its length. ``--curve
N`` also trains the first setting for N rounds both ways, and prints the training loss of each round
and the accuracy on other images.

TFLOP/s count the convolutions and matrix products of the forward and backward passes; the ceiling
is that of a large matrix product. The ratio in the last line is the plain loop's time a round over
that of the clients side by side, the median over all settings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fedsim.data.federation import Federation, federate
from fedsim.data.partition import iid
from fedsim.data.source import Source
from fedsim.data.statistics import Statistics
from fedsim.engine.local import LocalTrainer
from fedsim.engine.memory import client_bytes
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Batch, Examples, LocalSGD
from fedsim.models import Model, Net, Weights, stacked
from fedsim.models.layers import channels_last
from fedsim.models.resnet import resnet8, resnet18, resnet34

MODELS: dict[str, Callable[..., Model]] = {
    "resnet8": resnet8,
    "resnet18": resnet18,
    "resnet34": resnet34,
}
SHAPE, CLASSES = (3, 32, 32), 100
TEST = 1000
WARM_UP = 2
TOLERANCE = {"float32": 1e-2, "tf32": 5e-2, "bfloat16": 2e-1}
"""Of a step. TF32 rounds inputs to 1e-3 and bfloat16 to 4e-3, in each of dozens of layers. Float32
sums in another order differ by 1e-7 only, but a ReLU whose input is that near to 0 lets a gradient
pass in one and not in the other: one of the 128 pixels that a batch of 8 has in the last layers."""


@dataclass(frozen=True)
class Row:
    """What one setting gave; seconds are medians a round."""

    model: str
    batch_size: int
    clients: int
    at_a_time: int
    side_by_side: float
    plain_loop: float
    difference: float
    teraflops: float

    @property
    def ratio(self) -> float:
        """How often as long the plain loop takes."""
        return self.plain_loop / self.side_by_side


class Cohort:
    """The clients of one setting, and ways to train them for a round."""

    def __init__(self, name: str, batch_size: int, clients: int, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.model = MODELS[name](SHAPE, CLASSES)
        self.net = Net(self.model)
        self.device = torch.device(args.device)
        self.autocast = args.precision == "bfloat16"
        arrays = self.net.initial_weights()
        self.w = {n: channels_last(tensor.to(self.device)) for n, tensor in arrays.items()}
        self.federation = images(clients, args.examples)
        self.method = LocalSGD()
        self.training = LocalTraining(
            epochs=1,
            batch_size=batch_size,
            lr=0.05,
            momentum=0.5,
            steps=args.steps,
            precision=args.precision,
        )
        one = client_bytes(self.net, self.w, batch_size, SHAPE)
        fitting = max(1, int(args.memory * 2**30 / one))
        self.at_a_time = ceil(clients / ceil(clients / fitting))
        self.stacked = self.trainer(self.training, True)
        self.batches = self._prepare()

    def trainer(self, training: LocalTraining, stacked: bool) -> LocalTrainer:
        """Return what trains the clients, side by side or one by one."""
        statistics = Statistics.of(self.federation)
        return LocalTrainer(
            self.net, self.federation, statistics, training, 0, stacked, self.device
        )

    def _prepare(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Return each client's batches, on the device."""
        loader = self.stacked.loader
        prepared = []
        for client in range(self.federation.num_clients):
            own = Examples(self.federation.labelled(client), True)
            steps = self.training.steps or -(-len(own) // self.training.batch_size)
            stream = loader.batches(own, np.random.default_rng(client), steps, False)
            prepared.append([(batch.x, truth) for batch, truth in stream])
        return prepared

    def round(self, trainer: LocalTrainer, w: Weights) -> tuple[Weights, float]:
        """Return the mean of the weights and of the losses of all clients after a round."""
        total: dict[str, Tensor] = {}
        losses = []
        clients = trainer.clients(1, range(self.federation.num_clients))
        for begin in range(0, len(clients), self.at_a_time):
            chunk = clients[begin : begin + self.at_a_time]
            for found in trainer.update_all(self.method, w, chunk):
                if isinstance(found, Exception):
                    raise found
                upload, _ = found
                add(total, upload.arrays["arrays"])
                losses.append(upload.metrics["train_loss"])
        return {n: tensor / len(clients) for n, tensor in total.items()}, statistics.mean(losses)

    def plain(self, clients: int) -> None:
        """Train so many clients for a round by a plain loop."""
        total: dict[str, Tensor] = {}
        for batches in self.batches[:clients]:
            model = deepcopy(self.model).to(self.device).train()
            settings = self.training
            optimiser = torch.optim.SGD(model.parameters(), settings.lr, settings.momentum)
            for x, y in batches:
                optimiser.zero_grad()
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    loss = F.cross_entropy(model(x), y)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            add(total, {name: tensor.detach() for name, tensor in model.state_dict().items()})

    def flops(self) -> int:
        """Return the operations of a round."""
        w = {name: tensor.to("meta") for name, tensor in self.w.items()}
        leaves = [w[name].requires_grad_() for name in sorted(self.net.trainable)]
        example = Batch(
            torch.empty(1, *SHAPE, device="meta"),
            torch.empty(1, dtype=torch.int64, device="meta"),
            torch.empty(1, device="meta"),
        )
        with FlopCounterMode(display=False) as counter:
            loss, _ = self.method.loss(self.net, w, example)
            torch.autograd.grad(loss, leaves)
        examples = sum(len(x) for batches in self.batches for x, _ in batches)
        return examples * int(counter.get_total_flops())


def images(clients: int, examples: int) -> Federation:
    """Return made-up images, dealt out evenly."""
    rng = np.random.default_rng(0)
    y = np.arange(clients * examples) % CLASSES
    pattern = rng.integers(0, 128, (CLASSES, *SHAPE), dtype=np.uint8)

    def draw(y: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return images of classes: half of each pixel tells which."""
        return pattern[y] + rng.integers(0, 128, (len(y), *SHAPE), dtype=np.uint8)

    y_test = np.arange(TEST) % CLASSES
    source = Source(
        name="made-up",
        x_train=draw(y),
        y_train=y,
        x_test=draw(y_test),
        y_test=y_test,
        num_classes=CLASSES,
    )
    return federate(source, num_clients=clients, partition=iid)


def add(total: dict[str, Tensor], arrays: Weights) -> None:
    """Add arrays up."""
    if total:
        torch._foreach_add_(list(total.values()), [arrays[name] for name in total])
    else:
        total.update({name: tensor.clone() for name, tensor in arrays.items()})


def seconds(device: torch.device, once: Callable[[], object], rounds: int, warm_up: int) -> float:
    """Return the median time of a call, after the warm-up."""
    times = []
    for _ in range(warm_up + rounds):
        begin = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[warm_up:])


def difference(cohort: Cohort) -> float:
    """Return how far the mean first step is from that of float32 one by one, over its length."""
    step = replace(cohort.training, steps=1)
    one, _ = cohort.round(cohort.trainer(replace(step, precision="float32"), False), cohort.w)
    other, _ = cohort.round(cohort.trainer(step, True), cohort.w)

    def length(a: Weights, b: Weights) -> float:
        squares = [float((a[name] - b[name]).double().square().sum()) for name in a]
        return float(np.sqrt(sum(squares)))

    return length(other, one) / length(one, cohort.w)


def curves(cohort: Cohort, rounds: int) -> None:
    """Print training loss and accuracy of each round, side by side and in float32 one by one."""
    exact = replace(cohort.training, precision="float32")
    ways = {"side by side": cohort.stacked, "one by one": cohort.trainer(exact, False)}
    for name, trainer in ways.items():
        w, found = cohort.w, []
        for _ in range(rounds):
            w, loss = cohort.round(trainer, w)
            scores, _ = trainer.test(cohort.method, w, np.arange(TEST))
            right = scores["generic"][0] == cohort.federation.source.y_test
            found.append(f"{loss:.3f} ({right.mean():.1%})")
        print(f"training loss and accuracy, {name}: {', '.join(found)}", flush=True)


def ceiling(device: torch.device, precision: str) -> float:
    """Return the TFLOP/s of a large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / seconds(device, lambda: a @ a, 10, 2) / 1e12


def measure(name: str, batch_size: int, clients: int, args: argparse.Namespace) -> Row:
    """Check and time one setting."""
    cohort = Cohort(name, batch_size, clients, args)
    apart = difference(cohort)
    if not apart < TOLERANCE[args.precision]:
        raise SystemExit(
            f"{name}, batch {batch_size}, {clients} clients: side by side a step differs by "
            f"{apart:.1e} from one by one, more than {TOLERANCE[args.precision]:.0e}"
        )
    if args.curve:
        curves(cohort, args.curve)
        args.curve = 0
    stacked = seconds(
        cohort.device, lambda: cohort.round(cohort.stacked, cohort.w), args.rounds, WARM_UP
    )
    if not cohort.stacked.stacked:
        raise SystemExit(f"{name}, batch {batch_size}, {clients} clients: they went one by one")
    cohort.plain(1)
    return Row(
        model=name,
        batch_size=batch_size,
        clients=clients,
        at_a_time=cohort.at_a_time,
        side_by_side=stacked,
        plain_loop=seconds(cohort.device, lambda: cohort.plain(clients), 1, 0),
        difference=apart,
        teraflops=cohort.flops() / stacked / 1e12,
    )


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet34"], choices=MODELS)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--clients", type=int, nargs="+", default=[12, 40, 100])
    parser.add_argument("--examples", type=int, default=271, help="a client (CIFAR-100-LT: 271)")
    parser.add_argument("--steps", type=int, default=0, help="0: an epoch")
    parser.add_argument("--memory", type=float, default=64.0, help="GiB for a stack")
    parser.add_argument("--precision", choices=TOLERANCE, default="float32")
    parser.add_argument("--convolutions", choices=("kernels", "grouped"), default="kernels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--curve", type=int, default=0, help="rounds; 0: none")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.convolutions == "grouped":
        stacked.has_kernels = lambda x: False
    # The plain loop's; fedsim sets what it needs.
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    device = torch.device(args.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"
    most = ceiling(device, args.precision)
    print(f"PyTorch {torch.__version__} on {card}; a matrix product: {most:.1f} TFLOP/s\n")
    print("| model | batch | clients | at a time | side by side, s | plain loop, s "
          "| ratio | difference | TFLOP/s |\n" + "|---" * 9 + "|")  # fmt: skip
    rows = []
    for name, batch, clients in itertools.product(args.models, args.batch_sizes, args.clients):
        row = measure(name, batch, clients, args)
        rows.append(row)
        print(
            f"| {name} | {batch} | {clients} | {row.at_a_time} | {row.side_by_side:.3f} | "
            f"{row.plain_loop:.3f} | {row.ratio:.1f} | "
            f"{row.difference:.0e} | {row.teraflops:.2f} |",
            flush=True,
        )
    if args.json:
        result = {"card": card, "ceiling": most, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(result, indent=1))
    print(f"ratio {statistics.median(row.ratio for row in rows):.2f}")


if __name__ == "__main__":
    main()
