"""The benchmarks' work, and the client that a Flower user would write for it.

The client stands in a module of its own, not in the one that is run, so that Flower's actors
import it: only then does what they keep between messages last.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedsim import Experiment
from fedsim.data.federation import Federation
from fedsim.simulation import load_federation, make_task

CLIENTS = 1000

WORKLOADS: dict[str, dict[str, Any]] = {
    "w1": {"model": {"name": "cnn"}, "cohort": 20},
    "w2": {"model": {"name": "linear"}, "cohort": 100},
    "fedlabel": {
        "model": {"name": "cnn"},
        "cohort": 20,
        "method": {"name": "fedlabel", "warmup_rounds": 0},
        "labelled": 0.2,
    },
    "fedloge": {"model": {"name": "cnn"}, "cohort": 20, "method": {"name": "fedloge"}},
}
"""w1: a CNN, where a round is mostly arithmetic; w2: logistic regression, where it is mostly
overhead; and two of the methods on the CNN."""


def experiment(workload: str, rounds: int) -> Experiment:
    """Return a workload: Fashion-MNIST, 1000 IID clients of 60 examples, six steps a client."""
    work = WORKLOADS[workload]
    return Experiment(
        name=workload,
        data={"source": "fashion-mnist"},
        clients={"count": CLIENTS, "partition": "iid", "labelled": work.get("labelled", 1.0)},
        model=work["model"],
        method=work.get("method", {"name": "fedavg"}),
        training={
            "rounds": rounds,
            "participation": work["cohort"],
            "local_epochs": 1,
            "batch_size": 10,
            "lr": 0.05,
        },
        evaluation={"every": rounds, "participation": 2},
        engine={"backend": "ray", "workers": 2},
    )


app = ClientApp()
"""Trains one client as a Flower user would: an ``nn.Module``, ``torch.optim.SGD`` and tensors."""


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model of the message for an epoch on the node's own examples."""
    config = message.content["config"]
    federation, model, mean, std = _prepare(config["workload"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    index = federation.train(context.node_config["partition-id"])
    x = (torch.from_numpy(federation.source.x_train[index]).float() - mean) / std
    y = torch.from_numpy(federation.source.y_train[index])
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    losses = []
    for batch in torch.randperm(len(y)).split(config["batch-size"]):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    metrics = {"num-examples": len(y), "train-loss": sum(losses) / len(losses)}
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)


@lru_cache(maxsize=1)
def _prepare(workload: str) -> tuple[Federation, nn.Module, Tensor, Tensor]:
    """Return, once for each process, the data, the model, and the inputs' mean and deviation."""
    torch.set_num_threads(1)
    work = experiment(workload, rounds=1)
    federation = load_federation(work)
    model = make_task(work, federation, Path("unused")).model()
    mean, std = federation.source.normalisation()
    return federation, model, torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
