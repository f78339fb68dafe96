"""The benchmarks' work in other simulators, as their users would write it.

Flower runs its own FedAvg and a client in plain PyTorch; FedLabel and FedLoGe, which it doesn't
have, are this project's strategies and client updates, one client at a time: the ratio is then that
of the engines alone. pfl runs its own FederatedAveraging, a ``PyTorchTensorDataset`` for each
client, the inputs normalised beforehand, in two processes that ``torchrun`` starts, as its
documentation says.

All start from the same weights and train as many clients of the same federation in each round, with
batches of the same size, as many steps, and the learning rate of plain SGD. (pfl doesn't shuffle a
client's examples and takes the clients in their order, which spares it a little. A CNN's features
are flattened channel by channel, by ``torch.nn.Flatten``: in the memory layout that plain PyTorch
has, the project's order of them would take a step 2 % longer.)
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor, nn
from torch.nn import functional as F

import fedsim
from experiments.benchmarks.harness import RAYS_OWN, Measured, Stopwatch, peak_mib, pss_mib
from experiments.benchmarks.workloads import workload
from fedsim.data.federation import Federation
from fedsim.engine import flower
from fedsim.engine.evaluation import num_blocks
from fedsim.engine.worker import Worker
from fedsim.models.layers import Flatten
from fedsim.simulation import initial_arrays, load_federation, make_task
from strategies import FedLabel, FedLoGe

# ----- Flower ------------------------------------------------------------------------------


def run_flower(name: str, rounds: int) -> Measured:
    """Run a workload in Flower's own simulation."""
    from flwr.simulation import run_simulation  # it imports Ray, which fedsim does in its own way

    logging.getLogger("flwr").setLevel(logging.ERROR)
    work = workload(name, rounds)
    federation = load_federation(work)
    task = make_task(work, federation, Path("unused"))
    training = work.training
    watch = Stopwatch()
    memory: list[float] = []
    models: list[ArrayRecord] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        count = work.clients.count
        strategy = _flower_strategy(work.method.name, int(training.participation), count)
        _note_rounds(strategy, watch, rounds)
        config: Any = {"workload": name, "lr": training.lr, "batch-size": training.batch_size}
        result = strategy.start(
            grid=grid,
            initial_arrays=flower.to_record(initial_arrays(task)),
            num_rounds=rounds,
            train_config=ConfigRecord(config),
        )
        memory.extend((pss_mib(), peak_mib(), pss_mib(without=RAYS_OWN)))
        models.append(result.arrays)

    run_simulation(
        server,
        app if work.method.name == "fedavg" else fedsim.client_app(work),
        num_supernodes=work.clients.count,
        backend_config={
            "init_args": {"num_cpus": 2, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    if work.method.name == "fedavg":
        _, model, mean, std = _prepare(name)
        model.load_state_dict(models[0].to_torch_state_dict())
        accuracy = _accuracy(federation, model, mean, std)
    else:
        tested = Worker(task).test_generic(
            flower.from_record(models[0]), range(num_blocks(federation))
        )
        predicted, _ = tested.scores["generic"]
        accuracy = float((predicted == federation.source.y_test).mean())
    more = {"accuracy": accuracy, "without_ray_mib": memory[2]}
    return Measured(
        ends=watch.ends, begins=watch.begins, pss_mib=memory[0], peak_mib=memory[1], more=more
    )


def _flower_strategy(method: str, cohort: int, count: int) -> Strategy:
    """Return Flower's own FedAvg, or this project's strategy; neither has clients test."""
    make: Any = {"fedavg": FedAvg, "fedlabel": FedLabel, "fedloge": FedLoGe}[method]
    strategy: Strategy = make(
        fraction_train=cohort / count,
        min_train_nodes=cohort,
        min_available_nodes=count,
        fraction_evaluate=0.0,
    )
    return strategy


def _note_rounds(strategy: Strategy, watch: Stopwatch, rounds: int) -> None:
    """Let a strategy note when each round ends, and refuse rounds that lack a client."""
    aggregate = strategy.aggregate_train

    def aggregate_train(
        server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        failed = [reply.error.reason for reply in replies if reply.has_error()]
        if failed:
            raise RuntimeError(f"Flower: {len(failed)} clients failed, the first: {failed[0]}")
        answer = aggregate(server_round, replies)
        watch.lap(last=server_round == rounds)
        return answer

    strategy.aggregate_train = aggregate_train  # type: ignore[method-assign]


app = ClientApp()
"""Trains one client as a Flower user would: an ``nn.Module``, ``torch.optim.SGD`` and tensors.

Flower's actors import it from here: only then does what they keep between messages last."""


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model of the message for an epoch on the node's own examples."""
    received: Any = message.content  # of any records
    config = received["config"]
    federation, model, mean, std = _prepare(config["workload"])
    model.load_state_dict(received["arrays"].to_torch_state_dict())
    index = federation.train(int(context.node_config["partition-id"]))
    x = (torch.from_numpy(federation.source.x_train[index]).float() - mean) / std
    y = torch.from_numpy(federation.source.y_train[index])
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    losses = []
    for batch in torch.split(torch.randperm(len(y)), config["batch-size"]):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    metrics: dict[str, Any] = {"num-examples": len(y), "train_loss": sum(losses) / len(losses)}
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    )
    return Message(content, reply_to=message)


@lru_cache(maxsize=1)
def _prepare(name: str) -> tuple[Federation, nn.Module, Tensor, Tensor]:
    """Return, once for each process, the data, the model, and the inputs' mean and deviation."""
    torch.set_num_threads(1)
    work = workload(name, rounds=1)
    federation = load_federation(work)
    model = make_task(work, federation, Path("unused")).model()
    for place, layer in model.backbone.named_children():
        if isinstance(layer, Flatten):
            setattr(model.backbone, place, nn.Flatten())
    trailing = (1,) * (federation.source.x_train.ndim - 2)
    mean, std = (torch.tensor(a).view(-1, *trailing) for a in federation.source.normalisation())
    return federation, model, mean, std


@torch.no_grad()
def _accuracy(federation: Federation, model: nn.Module, mean: Tensor, std: Tensor) -> float:
    """Return a model's accuracy on the test examples."""
    x = (torch.from_numpy(federation.source.x_test).float() - mean) / std
    return float((model(x).argmax(1).numpy() == federation.source.y_test).mean())


# ----- pfl ---------------------------------------------------------------------------------


class PflModule(nn.Module):
    """A model with the loss and the metrics that pfl asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        return F.cross_entropy(self.model(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Return the loss, which pfl measures once, before the first round."""
        weighted = import_module("pfl.metrics").Weighted
        return {"loss": weighted(self.loss(x, y).item() * len(y), len(y))}


def run_pfl(name: str, rounds: int) -> Measured | None:
    """Run a workload in pfl, as one of the processes that ``torchrun`` started."""
    # Not everybody has it: mypy would ask for it.
    algorithm, weighting, simulate, data, tensors, pfl_model, hyperparam, sampling, callback = (
        import_module(f"pfl.{module}")
        for module in (
            "algorithm.federated_averaging",
            "aggregate.weighting",
            "aggregate.simulate",
            "data",
            "data.pytorch",
            "model.pytorch",
            "hyperparam",
            "data.sampling",
            "callback.base",
        )
    )
    params = import_module("pfl.algorithm.base").NNAlgorithmParams
    work = workload(name, rounds)
    federation, model, mean, std = _prepare(name)
    source = federation.source
    start = initial_arrays(make_task(work, federation, Path("unused")))
    model.load_state_dict({key: torch.tensor(array) for key, array in start.items()})
    x = (torch.from_numpy(source.x_train).float() - mean) / std
    y = torch.from_numpy(source.y_train)
    ends: list[float] = []

    class Note(callback.TrainingProcessCallback):  # type: ignore[name-defined, misc]
        def after_central_iteration(self, *args: Any, **kwargs: Any) -> tuple[bool, Any]:
            ends.append(time.monotonic())
            return False, import_module("pfl.metrics").Metrics()

    def dataset(client: int) -> Any:
        index = federation.train(client)
        return tensors.PyTorchTensorDataset((x[index], y[index]), user_id=str(client))

    clients = data.FederatedDataset(
        dataset, sampling.get_user_sampler("minimize_reuse", list(range(work.clients.count)))
    )
    module = PflModule(model)
    training = work.training
    algorithm.FederatedAveraging().run(
        params(
            central_num_iterations=rounds,
            evaluation_frequency=rounds,
            train_cohort_size=training.participation,
            val_cohort_size=0,
        ),
        simulate.SimulatedBackend(clients, None, [weighting.WeightByDatapoints()]),
        pfl_model.PyTorchModel(
            module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0)
        ),
        hyperparam.NNTrainHyperParams(
            local_num_epochs=training.local_epochs,
            local_learning_rate=training.lr,
            local_batch_size=training.batch_size,
        ),
        hyperparam.NNEvalHyperParams(local_batch_size=None),
        [Note()],
        send_metrics_to_platform=False,
    )
    if os.environ.get("RANK", "0") != "0":
        return None
    memory = pss_mib(os.getppid() if "RANK" in os.environ else None)
    accuracy = _accuracy(federation, model, mean, std)
    more = {"accuracy": accuracy, "without_ray_mib": memory}
    return Measured(ends=ends, pss_mib=memory, peak_mib=peak_mib(), more=more)
