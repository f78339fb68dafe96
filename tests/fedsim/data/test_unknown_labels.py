"""Sources with training examples whose label nobody knows: who gets them, and what clients see."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedsim
from clients.fedlabel import FedLabel
from clients.fixmatch import FixMatchGlobal
from fedsim.data import partition
from fedsim.data.digits import digits
from fedsim.data.federate import federate
from fedsim.data.source import UNKNOWN
from fedsim.data.statistics import Statistics
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.errors import DataError
from fedsim.models import Net
from fedsim.models.small import cnn
from tests.fedsim.data.test_federation import owned_by, quietly, toy


def forgetting(source, where):
    """The source without the labels of some training examples."""
    y = source.y_train.copy()
    y[where] = UNKNOWN
    return replace(source, y_train=y)


def unknown_of(source, share, seed=0):
    rng = np.random.default_rng(seed)
    return forgetting(source, rng.random(len(source.y_train)) < share)


class TestFederate:
    @given(
        split=st.sampled_from([partition.iid, partition.dirichlet, partition.client_dirichlet]),
        share=st.floats(0, 0.95),
        labelled=st.floats(0, 1),
        each=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_labels_are_kept_of_those_that_are_known(self, split, share, labelled, each, seed):
        source = unknown_of(toy(), share, seed)
        federation = quietly(
            source,
            num_clients=5,
            partition=split,
            labelled=labelled,
            label_each_class=each,
            seed=seed,
        )
        assert sorted(federation.train_index) == list(range(120))
        assert (
            federation.class_counts.tolist()
            == np.bincount(source.y_train[source.y_train >= 0], minlength=4).tolist()
        )
        for client in range(5):
            y = source.y_train[federation.train(client)]
            known = int((y >= 0).sum())
            assert (y[:known] >= 0).all()  # the unknown ones come last
            kept = int(np.floor(labelled * known + 0.5 + 1e-9))
            if labelled > 0 and known:
                kept = max(kept, 1)
            assert len(federation.labelled(client)) == federation.num_labelled[client] == kept
            first = source.y_train[federation.labelled(client)]
            if each:
                assert len(set(first)) == min(kept, len(set(y[:known])))

    def test_known_labels_fall_as_without_unknown_examples(self):
        """What is added at the end without a label changes nothing for the others."""
        whole = toy()
        more = replace(
            whole,
            x_train=np.zeros((150, 1), np.float32),
            y_train=np.append(whole.y_train, np.full(30, UNKNOWN)),
        )
        options = {"num_clients": 4, "partition": owned_by([40, 30, 20, 30]), "labelled": 0.5}
        alone = federate(whole, **options)
        options["partition"] = owned_by([40, 30, 20, 60])
        federation = federate(more, **options)
        assert federation.num_labelled.tolist() == alone.num_labelled.tolist()
        sizes = [len(federation.test(client)) for client in range(4)]
        assert sizes == [len(alone.test(client)) for client in range(4)]

    def test_a_class_of_which_no_example_is_known_is_told(self):
        """Labels may be -1 and 1 by mistake."""
        source = toy()
        source = forgetting(source, source.y_train == 2)
        names = tuple(f"k{c}" for c in range(source.num_classes))
        source = replace(source, class_names=names)
        line = r"toy has no training example that is known to be of class 2 \(k2\)"
        with pytest.warns(UserWarning, match=line):
            federate(source, num_clients=2, partition=partition.iid)

    def test_the_table_has_them_as_class_minus_one(self):
        source = forgetting(toy(num_train=8, num_classes=2), [0, 5])
        table = quietly(source, num_clients=2, partition=owned_by([3, 5])).table()
        unknown = table[table["class"] == -1]
        assert unknown[["client", "labelled", "unlabelled", "test"]].to_numpy().tolist() == [
            [0, 0, 1, 0],
            [1, 0, 1, 0],
        ]
        y = source.y_train
        for client, examples in ((0, range(3)), (1, range(3, 8))):
            for label in (0, 1):
                count = sum(y[example] == label for example in examples)
                of_pair = table[(table["client"] == client) & (table["class"] == label)]
                assert of_pair["labelled"].tolist() == ([count] if count else [])

    def test_a_client_that_knows_no_class_has_no_local_test(self):
        source = forgetting(toy(), range(40))
        with pytest.warns(UserWarning, match="1 of 3 clients have no local .* knows their classes"):
            federation = federate(source, num_clients=3, partition=owned_by([40, 40, 40]))
        assert [len(federation.test(client)) for client in range(3)] == [0, 30, 30]
        assert len(federation.unlabelled(0)) == 40

    def test_natural_clients_keep_theirs(self):
        group = np.arange(120) % 4
        source = unknown_of(toy(group_train=group), 0.5)
        federation = quietly(source, num_clients=4, partition=partition.group)
        for client in range(4):
            assert sorted(federation.train(client)) == list(range(client, 120, 4))

    def test_a_long_tail_leaves_them(self):
        source = unknown_of(toy(), 0.25)
        federation = quietly(source, num_clients=3, partition=partition.iid, imbalance=0.1)
        unknown = np.flatnonzero(source.y_train < 0)
        assert set(unknown) <= set(federation.train_index)
        assert federation.class_counts[-1] < federation.class_counts[0]


class TestFederateFailure:
    def test_a_partition_that_deals_out_none_whose_label_is_known(self):
        def mine(y, group, num_clients, rng):
            return np.where(y < 0, 0, -1)

        with (
            pytest.raises(DataError, match=r"^partition mine deals out no example whose label is"),
            pytest.warns(UserWarning, match="to nobody"),
        ):
            federate(unknown_of(toy(), 0.5), num_clients=1, partition=mine)


@pytest.mark.parametrize(
    "method",
    [
        FedLabel(warmup_rounds=0, threshold=0.0),
        FedLabel(warmup_rounds=0, threshold=0.0, schedule="joint"),
        FixMatchGlobal(threshold=0.0),
    ],
    ids=["fedlabel", "joint", "fixmatch"],
)
def test_clients_train_alike_whether_a_label_is_hidden_or_unknown(method):
    hidden = federate(digits(), num_clients=6, partition=partition.iid, labelled=0.3)
    half = hidden.unlabelled(2)[::2]
    nobody = replace(hidden, source=forgetting(hidden.source, half))

    net = Net(cnn((1, 8, 8), 10))
    w = net.initial_weights()

    def train(federation):
        training = LocalTraining(epochs=1, batch_size=16, lr=0.05, momentum=0.5)
        trainer = LocalTrainer(net, federation, Statistics.of(hidden), training, 0)
        return trainer.update(method, w, 2, 3, {})

    (one, truth), (other, some) = train(hidden), train(nobody)
    for group, arrays in one.arrays.items():
        for name, tensor in arrays.items():
            torch.testing.assert_close(other.arrays[group][name], tensor, rtol=0, atol=0)
    assert some["pseudo_kept"] == truth["pseudo_kept"] > 0
    groups = ("head", "medium", "tail")
    checked = sum(some[f"pseudo_kept_{group}"] for group in groups)
    assert 0 < checked < some["pseudo_kept"] == sum(truth[f"pseudo_kept_{g}"] for g in groups)
    assert some["pseudo_correct"] == sum(some[f"pseudo_correct_{group}"] for group in groups)
    assert some["pseudo_correct"] <= checked


def test_a_run_on_data_that_are_partly_labelled(tmp_path):
    source = unknown_of(digits(), 0.7)
    arrays = {name: getattr(source, name) for name in ("x_train", "y_train", "x_test", "y_test")}
    np.savez(tmp_path / "mine.npz", **arrays)
    experiment = fedsim.Experiment(
        data={"source": f"npz:{tmp_path / 'mine.npz'}"},
        clients={"count": 5, "partition": "dirichlet", "alpha": 1.0},
        model={"name": "cnn"},
        method={"name": "fedlabel", "warmup_rounds": 0, "threshold": 0.2},
        training={"rounds": 2, "participation": 5, "local_steps": 3},
        engine={"backend": "inline"},
    )
    result = fedsim.simulate(experiment, out=tmp_path / "run")
    last = result.clients[result.clients["round"] == 2]
    assert last["num_train"].sum() == len(source.y_train)
    assert last["num_labelled"].sum() == (source.y_train >= 0).sum()
    assert (tmp_path / "run/report.html").exists()
