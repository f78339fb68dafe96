"""FedLoGe's authors' clients, first weights, and how their published run averaged."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from clients.fedloge import LoGeModel
from experiments.studies.fedloge_authors import Authors, clients, draws, first_weights
from fedsim import Experiment, simulate
from fedsim.errors import ConfigError
from fedsim.models import Net
from fedsim.models.resnet import resnet18

COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
SIZES = [215, 141, 207, 171, 243, 132, 178, 751, 618, 173, 602, 559, 821, 446, 221, 157, 127, 436,
         273, 246, 171, 124, 90, 190, 252, 91, 656, 129, 194, 482, 1106, 528, 243, 102, 215, 267,
         348, 153, 172, 176]  # fmt: skip
"""Examples of the classes and of the clients, as their log prints them."""


def test_the_clients_hold_what_the_authors_log_prints():
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(10), COUNTS))
    owner = clients(y, None, 40, np.random.default_rng())
    held = np.zeros((40, 10), int)
    np.add.at(held, (owner, y), 1)
    assert held[0].tolist() == [72, 83, 9, 1, 40, 5, 5, 0, 0, 0]
    assert held[30].tolist() == [190, 532, 336, 27, 4, 10, 0, 3, 2, 2]
    assert held[39].tolist() == [37, 0, 51, 30, 34, 9, 11, 3, 1, 0]
    assert held.sum(axis=1).tolist() == draws().sizes.tolist() == SIZES


def test_other_data_than_theirs_are_refused():
    with pytest.raises(ConfigError, match=r"40 clients, not .* to 30"):
        clients(np.repeat(np.arange(10), COUNTS), None, 30, np.random.default_rng())


def test_the_classifier_starts_from_the_loss_that_the_authors_log_prints():
    m = draws().start.double().numpy()
    norms = np.linalg.norm(m, axis=1)
    cosine = m @ m.T / np.outer(norms, norms)
    np.fill_diagonal(cosine, -1)
    loss = ((norms - 0.1) ** 2).sum() - np.arccos(cosine.max(axis=1)).mean()
    assert loss == pytest.approx(1.2786084, abs=1e-6)
    assert (m == 0).sum() == 3072


def test_the_model_starts_as_theirs():
    net = Net(resnet18((3, 32, 32), 10, width=1))
    w = Authors().initial(net, net.initial_weights(), np.random.default_rng())
    norms = w["etf.weight"].norm(dim=1)
    assert norms.mean().item() == pytest.approx(0.10058677, abs=1e-4)  # "Norm Mean" in their log
    assert torch.equal(w["etf.weight"] == 0, draws().start == 0)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3407)
        first_draw = torch.empty(64, 3, 3, 3).uniform_(-(27**-0.5), 27**-0.5)
    assert torch.equal(w["backbone.0.weight"], first_draw)
    assert w["etf.bias"].count_nonzero() == 10

    _, heads = first_weights()
    assert len({tuple(head["personal.bias"].tolist()) for head in heads}) == 40
    assert not torch.equal(heads[0]["personal.weight"], w["head.weight"])


@dataclass(frozen=True, kw_only=True)
class Numbered(Authors):
    """Uploads its client's number as the biases of the head: their mean tells the weights."""

    initial = LoGeModel.initial
    begin = LoGeModel.begin

    def update(self, w, client):
        upload = yield from super().update(w, client)
        arrays = upload.arrays["arrays"]
        number = torch.full_like(arrays["head.bias"], client.id)
        return replace(upload, arrays={"arrays": {**arrays, "head.bias": number}})


def experiment(rounds):
    strategy = "experiments.studies.fedloge_authors:ShuffledWeights"
    return Experiment(
        clients={"count": 40},
        model={"name": "mlp"},
        method={"name": strategy, "client": f"{__name__}:Numbered"},
        training={"rounds": rounds},
        engine={"backend": "inline"},
    )


def test_more_rounds_than_they_drew_are_refused_at_once(monkeypatch):
    monkeypatch.setattr("fedsim.engine.loop.run_rounds", lambda *_, **__: iter(()))
    simulate(experiment(rounds=500))
    with pytest.raises(ConfigError, match=r"^training\.rounds = 501: must be at most 500"):
        simulate(experiment(rounds=501))


def test_the_numbers_of_examples_are_dealt_out_anew_each_round():
    result = simulate(experiment(rounds=2))
    first, second = (of["others_examples"].tolist() for _, of in result.training.groupby("round"))
    assert sorted(first) == sorted(second) == sorted(SIZES)
    assert first != second
    assert first != SIZES
    mean = np.average(np.arange(40), weights=second)
    assert result.arrays["head.bias"] == pytest.approx(np.full(10, mean), rel=1e-6)
    assert abs(mean - np.average(np.arange(40), weights=first)) > 0.01
