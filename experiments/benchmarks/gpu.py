"""A round of residual networks on one device: clients side by side against a plain loop over them.

    python -m experiments.benchmarks.gpu --device cuda

trains cohorts on made-up images of 32 x 32 pixels and 100 classes, for each model, batch size and
number of clients, in float32 (``--precision tf32``: matrix products in TF32; ``bfloat16``: clients
side by side and plain loop under autocast, with weights in float32). It needs PyTorch and NumPy
only. A round is the training of all clients, each from the global weights, and their mean; two
rounds of each kind come first and aren't counted.

side by side
    fedsim's stacked training, as many clients at a time as fit into ``--memory`` (see
    `fedsim.engine.memory`). With ``--convolutions patches``, convolutions are batched products of
    weights and patches instead of grouped convolutions: faster where the library's grouped ones are
    slow, for nine times the memory.
one by one
    fedsim without stacking, never in bfloat16: what the numbers are checked against. After the
    first round no weight may differ by more than ``TOLERANCE`` of the largest one of its array.
plain loop
    For each client a copy of the ``nn.Module`` and ``torch.optim.SGD``, on batches that lie ready
    on the device.

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
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks.patches import by_patches
from fedsim.data.federation import Federation, federate
from fedsim.data.partition import iid
from fedsim.data.source import Source
from fedsim.data.statistics import Statistics
from fedsim.engine.local import LocalTrainer
from fedsim.engine.memory import client_bytes
from fedsim.engine.sgd import LocalTraining
from fedsim.engine.update import Batch, Examples, LocalSGD, Upload
from fedsim.models import Model, Net, Weights
from fedsim.models.resnet import resnet8, resnet18, resnet34

MODELS: dict[str, Callable[..., Model]] = {
    "resnet8": resnet8,
    "resnet18": resnet18,
    "resnet34": resnet34,
}
SHAPE, CLASSES = (3, 32, 32), 100
WARM_UP = 2
TOLERANCE = {"float32": 1e-3, "tf32": 5e-2, "bfloat16": 2e-1}
"""Float32 sums in another order differ by some 1e-7 a step, which BatchNorm in batches of 8
amplifies a thousandfold over a few dozen steps; TF32 rounds inputs to 1e-3, bfloat16 to 4e-3."""


@dataclass(frozen=True)
class Row:
    """What one setting gave; seconds are medians a round."""

    model: str
    batch_size: int
    clients: int
    at_a_time: int
    side_by_side: float
    one_by_one: float
    plain_loop: float
    difference: float
    teraflops: float

    @property
    def ratio(self) -> float:
        """How often as long the plain loop takes."""
        return self.plain_loop / self.side_by_side


class Cohort:
    """The clients of one setting, and three ways to train them for a round."""

    def __init__(self, name: str, batch_size: int, clients: int, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.model = MODELS[name](SHAPE, CLASSES)
        self.net = Net(self.model)
        patches = args.convolutions == "patches"
        fast_net = Net(by_patches(self.model)) if patches else self.net
        self.device = torch.device(args.device)
        self.w = {n: t.to(self.device) for n, t in self.net.initial_weights().items()}
        self.federation = images(clients, args.examples)
        self.training = LocalTraining(
            epochs=1, batch_size=batch_size, lr=0.05, momentum=0.5, steps=args.steps
        )
        self.autocast = args.precision == "bfloat16"
        fast = replace(self.training, precision="bfloat16") if self.autocast else self.training
        one = client_bytes(fast_net, self.w, batch_size, SHAPE)
        self.at_a_time = max(1, min(clients, int(args.memory * 2**30 / one)))
        statistics = Statistics.of(self.federation)
        self.stacked, self.alone = (
            LocalTrainer(net, self.federation, statistics, training, 0, stacked, self.device)
            for net, training, stacked in (
                (fast_net, fast, True),
                (self.net, self.training, False),
            )
        )
        self.batches = self._prepare()

    def _prepare(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Return each client's batches, on the device."""
        loader = self.alone.loader
        prepared = []
        for client in range(self.federation.num_clients):
            own = Examples(self.federation.labelled(client), True)
            steps = self.training.steps or -(-len(own) // self.training.batch_size)
            stream = loader.batches(own, np.random.default_rng(client), steps, False)
            prepared.append([(batch.x, truth) for batch, truth in stream])
        return prepared

    def round(self, trainer: LocalTrainer, at_a_time: int) -> Weights:
        """Return the mean of all clients' weights after a round of fedsim's."""
        total: dict[str, Tensor] = {}
        clients = trainer.clients(1, range(self.federation.num_clients))
        for begin in range(0, len(clients), at_a_time):
            chunk = clients[begin : begin + at_a_time]
            for found in trainer.update_all(LocalSGD(), self.w, chunk):
                if isinstance(found, Exception):
                    raise found
                add(total, uploaded(found[0]))
        return {name: tensor / len(clients) for name, tensor in total.items()}

    def plain(self) -> None:
        """Train a round by a plain loop over the clients."""
        total: dict[str, Tensor] = {}
        for batches in self.batches:
            model = deepcopy(self.model).to(self.device).train()
            settings = self.training
            optimiser = torch.optim.SGD(model.parameters(), settings.lr, settings.momentum)
            for x, y in batches:
                optimiser.zero_grad()
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    loss = F.cross_entropy(model(x), y)
                loss.backward()
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
            loss, _ = LocalSGD().loss(self.net, w, example)
            torch.autograd.grad(loss, leaves)
        examples = sum(len(x) for batches in self.batches for x, _ in batches)
        return examples * int(counter.get_total_flops())


def images(clients: int, examples: int) -> Federation:
    """Return made-up images, dealt out evenly."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (clients * examples, *SHAPE), dtype=np.uint8)
    y = np.arange(len(x)) % CLASSES
    source = Source(
        name="made-up",
        x_train=x,
        y_train=y,
        x_test=np.zeros((CLASSES, *SHAPE), dtype=np.uint8),
        y_test=np.arange(CLASSES),
        num_classes=CLASSES,
    )
    return federate(source, num_clients=clients, partition=iid)


def add(total: dict[str, Tensor], arrays: Weights) -> None:
    """Add arrays up."""
    for name, tensor in arrays.items():
        if name in total:
            total[name] += tensor
        else:
            total[name] = tensor.clone()


def uploaded(upload: Upload) -> Weights:
    """Return the arrays that a client sends."""
    return upload.arrays["arrays"]


def seconds(device: torch.device, once: Callable[[], object], rounds: int) -> float:
    """Return the median time of a call, after the warm-up."""
    times = []
    for _ in range(WARM_UP + rounds):
        begin = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM_UP:])


def difference(one: Weights, other: Weights) -> float:
    """Return the largest difference in any array, as a share of its largest entry."""
    return max(
        float((tensor - other[name]).abs().max() / tensor.abs().max().clamp(min=1e-3))
        for name, tensor in one.items()
    )


def ceiling(device: torch.device, precision: str) -> float:
    """Return the TFLOP/s of a large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / seconds(device, lambda: a @ a, 10) / 1e12


def measure(name: str, batch_size: int, clients: int, args: argparse.Namespace) -> Row:
    """Check and time one setting."""
    cohort = Cohort(name, batch_size, clients, args)
    apart = difference(
        cohort.round(cohort.alone, 1), cohort.round(cohort.stacked, cohort.at_a_time)
    )
    if not apart < TOLERANCE[args.precision]:
        raise SystemExit(
            f"{name}, batch {batch_size}, {clients} clients: side by side the weights differ by "
            f"{apart:.1e} from one by one, more than {TOLERANCE[args.precision]:.0e}"
        )
    device, rounds = cohort.device, args.rounds
    stacked = seconds(device, lambda: cohort.round(cohort.stacked, cohort.at_a_time), rounds)
    return Row(
        model=name,
        batch_size=batch_size,
        clients=clients,
        at_a_time=cohort.at_a_time,
        side_by_side=stacked,
        one_by_one=seconds(device, lambda: cohort.round(cohort.alone, 1), rounds),
        plain_loop=seconds(device, cohort.plain, rounds),
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
    parser.add_argument("--convolutions", choices=("grouped", "patches"), default="grouped")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if (args.device, args.convolutions, args.precision) == ("cpu", "patches", "bfloat16"):
        parser.error("--convolutions patches --precision bfloat16: BatchNorm needs a GPU for that")
    tf32 = args.precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    device = torch.device(args.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"
    most = ceiling(device, args.precision)
    print(f"PyTorch {torch.__version__} on {card}; a matrix product: {most:.1f} TFLOP/s\n")
    print("| model | batch | clients | at a time | side by side, s | one by one, s | plain loop, s "
          "| ratio | difference | TFLOP/s |\n" + "|---" * 10 + "|")  # fmt: skip
    rows = []
    for name, batch, clients in itertools.product(args.models, args.batch_sizes, args.clients):
        row = measure(name, batch, clients, args)
        rows.append(row)
        print(
            f"| {name} | {batch} | {clients} | {row.at_a_time} | {row.side_by_side:.3f} | "
            f"{row.one_by_one:.3f} | {row.plain_loop:.3f} | {row.ratio:.1f} | "
            f"{row.difference:.0e} | {row.teraflops:.2f} |",
            flush=True,
        )
    if args.json:
        result = {"card": card, "ceiling": most, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(result, indent=1))
    print(f"ratio {statistics.median(row.ratio for row in rows):.2f}")


if __name__ == "__main__":
    main()
