"""A round of residual networks on one device: clients side by side against a plain loop over them.

    python -m experiments.benchmarks.gpu
    python -m experiments.benchmarks.gpu --row resnet34:32:100 --row resnet18:8:40

trains cohorts on made-up images of 32 x 32 pixels and 100 classes, for each model, batch size and
number of clients, or for the rows that are named, in their order. It needs PyTorch and NumPy only.
A round is the training of all clients, each from the global weights, and their mean.

side by side
    fedsim's stacked training, as many clients at a time as fit into ``--memory`` (see
    `fedsim.engine.memory`); ``--precision`` is ``training.precision``. Convolutions are those of
    `fedsim.models.kernels`, but in float32 and with ``--convolutions grouped`` the library's
    grouped ones, into which ``vmap`` turns them. Two rounds come first and aren't counted. Where
    clients didn't fit side by side after all, or steps were begun operation by operation, the row
    says so.
plain loop
    For each client a copy of the ``nn.Module`` and ``torch.optim.SGD``, on batches that lie ready
    on the device; in bfloat16 under autocast. One round, after one client's.

The numbers are checked against fedsim's own training in float32, one client after the other: the
mean of the clients' first steps may differ by no more than ``TOLERANCE`` of its length in the
trained arrays, and ``BUFFERS`` in the running statistics of BatchNorm. ``--curve N`` also trains
the first setting for N rounds both ways, and prints the training loss of each round and the
accuracy on other images.

A row that fails, be it for want of memory, is printed as FAILED with the reason; the others are run
all the same, and the exit status tells. ``--json`` is written anew after each row.

TFLOP/s count the convolutions and matrix products of the forward and backward passes; the ceiling
is that of a large matrix product. The ratio in the last line is the plain loop's time a round over
that of the clients side by side, the median over all settings.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fedsim.data.federate import federate
from fedsim.data.federation import Federation
from fedsim.data.partition import iid
from fedsim.data.source import Source
from fedsim.data.statistics import Statistics
from fedsim.engine.evaluation import Evaluator
from fedsim.engine.local import LocalTrainer
from fedsim.engine.memory import client_bytes
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Batch, Examples, LocalSGD
from fedsim.errors import described
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
TOLERANCE = {
    "float32": {"resnet8": 0.03, "resnet18": 0.05, "resnet34": 0.1},
    "tf32": {"resnet8": 0.06, "resnet18": 0.18, "resnet34": 0.35},
    "bfloat16": {"resnet8": 0.15, "resnet18": 0.45, "resnet34": 0.85},
}
"""How far a step may be off in the trained arrays, of its length; without a step it is 1.

Rounding makes a ReLU whose input is near 0 let a gradient pass in one way and not in the other. How
many do grows with the size of the rounding and with depth, and the gradient's error with the square
root of that. One by one on a processor, a first step of batches of 2, 8 and 32 was off by 0.10
(ResNet-8), 0.33 and 0.66 (ResNet-34) in bfloat16 and by 0.035, 0.11 and 0.21 with inputs rounded
like TF32's; side by side in float32, where a few pixels decide, by up to 0.002, 0.009 and 0.014."""
BUFFERS = {"float32": 1e-4, "tf32": 4e-3, "bfloat16": 4e-2}
"""The same of the running statistics, which no gradient reaches: 1e-6, 8e-4 and 8e-3 at most."""

Setting = tuple[str, int, int]
"""Model, batch size and number of clients."""


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
    """Of a step in the trained arrays."""
    buffers: float
    """Of a step in the running statistics."""
    teraflops: float
    share: float
    """Of the ceiling."""
    fitted: bool
    """Whether as many clients as planned did train side by side."""
    in_graphs: bool
    """Whether no step had to be begun operation by operation for want of a graph."""

    @property
    def ratio(self) -> float:
        """How often as long the plain loop takes."""
        return self.plain_loop / self.side_by_side

    @property
    def remarks(self) -> str:
        """What its seconds suffer from."""
        found = [] if self.fitted else ["did not fit side by side as planned"]
        if not self.in_graphs:
            found.append("capture of a graph failed")
        return "; ".join(found)


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
        self._fitting = max(1, int(args.memory * 2**30 / one))
        self.stacked = self.trainer(self.training, True)
        self.batches = self._prepare()

    def trainer(self, training: LocalTraining, stacked: bool) -> LocalTrainer:
        """Return what trains the clients, side by side or one by one."""
        statistics = Statistics.of(self.federation)
        return LocalTrainer(
            self.net, self.federation, statistics, training, 0, stacked, self.device
        )

    def at_a_time(self, trainer: LocalTrainer) -> int:
        """Return how many clients train side by side, fewer once more have not fitted."""
        clients = self.federation.num_clients
        most = min(self._fitting, trainer.max_stack or self._fitting)
        return ceil(clients / ceil(clients / most))

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
        size = self.at_a_time(trainer)
        for begin in range(0, len(clients), size):
            chunk = clients[begin : begin + size]
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


def difference(cohort: Cohort) -> tuple[float, float]:
    """Return how far the mean first step is from that of float32 one by one, over its length.

    In the trained arrays and, apart from them, in the buffers: those move much further, and would
    hide a step that was left out.
    """
    step = replace(cohort.training, steps=1)
    one, _ = cohort.round(cohort.trainer(replace(step, precision="float32"), False), cohort.w)
    other, _ = cohort.round(cohort.trainer(step, True), cohort.w)

    def length(a: Weights, b: Weights, names: Collection[str]) -> float:
        squares = [float((a[name] - b[name]).double().square().sum()) for name in names]
        return float(np.sqrt(sum(squares)))

    trained, buffers = (
        length(other, one, names) / length(one, cohort.w, names)
        for names in (cohort.net.trainable, cohort.net.buffers)
    )
    return trained, buffers


def curves(cohort: Cohort, rounds: int) -> None:
    """Print training loss and accuracy of each round, side by side and in float32 one by one."""
    exact = replace(cohort.training, precision="float32")
    ways = {"side by side": cohort.stacked, "one by one": cohort.trainer(exact, False)}
    for name, trainer in ways.items():
        w, found = cohort.w, []
        for _ in range(rounds):
            w, loss = cohort.round(trainer, w)
            scores, _ = Evaluator(trainer).test_generic(cohort.method, w, np.arange(TEST))
            right = scores["generic"][0] == cohort.federation.source.y_test
            found.append(f"{loss:.3f} ({right.mean():.1%})")
        print(f"training loss and accuracy, {name}: {', '.join(found)}", flush=True)


def ceiling(device: torch.device, precision: str) -> float:
    """Return the TFLOP/s of a large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / seconds(device, lambda: a @ a, 10, 2) / 1e12


def measure(setting: Setting, most: float, args: argparse.Namespace) -> Row:
    """Check and time one setting; ``most`` TFLOP/s are the ceiling."""
    name, batch_size, clients = setting
    cohort = Cohort(name, batch_size, clients, args)
    trained, buffers = difference(cohort)
    for what, apart, tolerance in (
        ("a step", trained, TOLERANCE[args.precision][name]),
        ("a step of BatchNorm's running statistics", buffers, BUFFERS[args.precision]),
    ):
        if not apart <= tolerance:
            raise RuntimeError(
                f"{what} differs by {apart:.1e} from one by one in float32, more than {tolerance:g}"
            )
    if args.curve:
        curves(cohort, args.curve)
        args.curve = 0
    stacked = seconds(
        cohort.device, lambda: cohort.round(cohort.stacked, cohort.w), args.rounds, WARM_UP
    )
    if not cohort.stacked.stacked:
        raise RuntimeError("clients went one by one")
    cohort.plain(1)
    teraflops = cohort.flops() / stacked / 1e12
    return Row(
        model=name,
        batch_size=batch_size,
        clients=clients,
        at_a_time=cohort.at_a_time(cohort.stacked),
        side_by_side=stacked,
        plain_loop=seconds(cohort.device, lambda: cohort.plain(clients), 1, 0),
        difference=trained,
        buffers=buffers,
        teraflops=teraflops,
        share=teraflops / most,
        fitted=cohort.stacked.max_stack is None,
        in_graphs=not cohort.stacked.graphs_failed,
    )


def write(file: Path, result: dict[str, Any]) -> None:
    """Write JSON: the file is the old one or the new one, whatever happens."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(result, indent=1))
    new.replace(file)


def setting(text: str) -> Setting:
    """Read a row of the command line.

    >>> setting("resnet34:32:100")
    ('resnet34', 32, 100)
    """
    name, *numbers = text.split(":")
    if name not in MODELS or len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give model:batch size:clients, such as resnet34:32:100; the models are "
            f"{', '.join(MODELS)}"
        )
    batch_size, clients = map(int, numbers)
    if not batch_size or not clients:
        raise argparse.ArgumentTypeError(f"{text!r}: batch size and clients must be at least 1")
    return name, batch_size, clients


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--row", type=setting, action="append", metavar="MODEL:BATCH:CLIENTS", dest="settings",
        help="only this setting; may be given several times",
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet34"], choices=MODELS)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--clients", type=int, nargs="+", default=[12, 40, 100])
    parser.add_argument("--examples", type=int, default=271, help="a client (CIFAR-100-LT: 271)")
    parser.add_argument("--steps", type=int, default=0, help="0: an epoch")
    parser.add_argument(
        "--memory", type=float, help="GiB for a stack; by default half the card's, or 64"
    )
    parser.add_argument(
        "--precision", choices=TOLERANCE, help="by default bfloat16 on a card, else float32"
    )
    parser.add_argument("--convolutions", choices=("kernels", "grouped"), default="kernels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--curve", type=int, default=0, help="rounds; 0: none")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.settings = args.settings or list(
        itertools.product(args.models, args.batch_sizes, args.clients)
    )
    device = torch.device(args.device)
    on_card = device.type == "cuda"
    args.precision = args.precision or ("bfloat16" if on_card else "float32")
    if args.memory is None and on_card:
        # The other half stays free, as with fedsim's own workers: see `engine.memory.fitting`.
        args.memory = torch.cuda.get_device_properties(device).total_memory / 2 / 2**30
    elif args.memory is None:
        args.memory = 64.0
    return args


def say(line: str) -> None:
    """Print a line at once: what was measured must not be lost with the process."""
    print(line, flush=True)


def main() -> None:
    """Run the benchmark of the command line."""
    args = arguments()
    if args.convolutions == "grouped":
        stacked.has_kernels = lambda x: False
    # The plain loop's; fedsim sets what it needs.
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    device = torch.device(args.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"
    most = ceiling(device, args.precision)
    say(
        f"PyTorch {torch.__version__} on {card}, {args.precision}; a matrix product: {most:.1f} "
        f"TFLOP/s; {args.memory:.0f} GiB for a stack\n"
    )
    columns = (
        "model", "batch", "clients", "at a time", "side by side, s", "plain loop, s", "ratio",
        "difference", "of buffers", "TFLOP/s", "of the ceiling", "remarks",
    )  # fmt: skip
    say(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    rows: list[Row] = []
    failed: list[dict[str, Any]] = []
    for name, batch, clients in args.settings:
        begin = f"| {name} | {batch} | {clients} |"
        try:
            row = measure((name, batch, clients), most, args)
        except (Exception, SystemExit) as error:  # the other rows are worth having
            reason = described(error)
            traceback.print_exc()
            failed.append({"model": name, "batch_size": batch, "clients": clients, "why": reason})
            say(f"{begin}{' |' * (len(columns) - 4)} FAILED: {reason} |")
        else:
            rows.append(row)
            say(
                f"{begin} {row.at_a_time} | {row.side_by_side:.3f} | {row.plain_loop:.3f} | "
                f"{row.ratio:.1f} | {row.difference:.0e} | {row.buffers:.0e} | "
                f"{row.teraflops:.2f} | {row.share:.1%} | {row.remarks} |"
            )
        if device.type == "cuda":  # the next one's arrays are of other sizes
            gc.collect()
            torch.cuda.empty_cache()
        if args.json:
            result = {
                "card": card,
                "precision": args.precision,
                "ceiling": most,
                "rows": [asdict(row) for row in rows],
                "failed": failed,
            }
            write(args.json, result)
    if rows:
        say(f"ratio {statistics.median(row.ratio for row in rows):.2f}")
    if failed:
        sys.exit(f"{len(failed)} of {len(args.settings)} rows failed")


if __name__ == "__main__":
    main()
