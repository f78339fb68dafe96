"""Partitioners of flwr-datasets, with a stand-in for that library and for ``datasets``."""

import sys
from types import ModuleType

import numpy as np
import pytest

import fedsim
from fedsim import Experiment, registry
from fedsim.data.flower_partitioners import as_partition
from fedsim.errors import ConfigError, DataError

Y = np.array([0, 1, 2, 0, 1, 2])


class Dataset:
    """As much of a `datasets.Dataset` as partitioners give back."""

    def __init__(self, columns):
        self.columns = columns
        self.column_names = list(columns)

    @classmethod
    def from_dict(cls, columns):
        return cls(columns)

    def __getitem__(self, column):
        return self.columns[column]

    def select(self, rows):
        return Dataset(
            {name: list(np.asarray(column)[rows]) for name, column in self.columns.items()}
        )


class Partitioner:
    def __init__(self):
        self.dataset = None


Partitioner.__module__ = "flwr_datasets.partitioner.partitioner"


class ByLabel(Partitioner):
    """Deals the examples out by their label, which ``shift`` moves to another client."""

    def __init__(
        self,
        num_partitions: int,
        partition_by: str,
        shift: "int | list[int] | np.ndarray[tuple, np.dtype[np.float64]]" = 0,
        wanted: str = "all",
        seed: int | None = 42,
    ):
        super().__init__()
        self.num_partitions = num_partitions if wanted != "more" else num_partitions + 1
        self.by, self.shift, self.wanted, self.seed = partition_by, shift, wanted, seed

    def load_partition(self, partition_id):
        if self.wanted == "error":
            raise ValueError("too few examples")
        client = (np.array(self.dataset[self.by]) + self.shift) % 3
        if self.wanted == "some":
            client[0] = 9
        rows = np.flatnonzero((client == partition_id) | (self.wanted == "twice"))
        part = self.dataset.select(rows)
        return Dataset({"label": part["label"]}) if self.wanted == "columns" else part


class ByNaturalId(ByLabel):
    """Named such that the natural group decides."""


ByNaturalId.__name__ = "ByNaturalIdPartitioner"


class ByWriter(ByNaturalId):
    """Of one's own, by another name."""


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    datasets, mine = ModuleType("datasets"), ModuleType("stand_in_partitioners")
    datasets.Dataset, mine.ByLabel = Dataset, ByLabel
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setitem(sys.modules, "stand_in_partitioners", mine)


def deal(partitioner=ByLabel, group=None, count=3, **settings):
    rng = np.random.default_rng(0)
    return as_partition(partitioner)(Y, group, count, rng, **settings).tolist()


def test_examples_go_where_the_partitioner_puts_them():
    assert deal() == [0, 1, 2, 0, 1, 2]
    assert deal(shift=1) == [1, 2, 0, 1, 2, 0]


def test_examples_that_it_leaves_out_are_nobodys():
    assert deal(wanted="some") == [-1, 1, 2, 0, 1, 2]


def test_a_partitioner_by_natural_ids_gets_the_groups():
    for partitioner in (ByNaturalId, ByWriter):
        assert deal(partitioner, group=np.array([2, 2, 1, 1, 0, 0])) == [2, 2, 1, 1, 0, 0]


def test_examples_of_unknown_label_follow_the_others():
    y = np.append(Y, [-1] * 4)
    rng = np.random.default_rng(0)
    owner = as_partition(ByLabel)(y, None, 3, rng, wanted="some")
    assert owner[:6].tolist() == [-1, 1, 2, 0, 1, 2]
    found = np.bincount(owner[6:], minlength=3)
    assert (np.abs(found - 4 * np.array([1, 2, 2]) / 5) < 1).all()
    assert found.sum() == 4
    natural = as_partition(ByNaturalId)(y, np.array([2, 2, 1, 1, 0, 0, 0, 1, 2, 2]), 3, rng)
    assert natural.tolist() == [2, 2, 1, 1, 0, 0, 0, 1, 2, 2]


def test_the_seed_is_the_experiments_own():
    seeds = []

    class Seeded(ByLabel):
        def load_partition(self, partition_id):
            seeds.append(self.seed)
            return super().load_partition(partition_id)

    as_partition(Seeded)(Y, None, 3, np.random.default_rng(0))
    as_partition(Seeded)(Y, None, 3, np.random.default_rng(1))
    assert seeds[0] == seeds[2] != seeds[3] == seeds[5]


def test_what_a_file_can_set():
    settings = registry.options(ByLabel)
    assert list(settings.model_fields) == ["shift", "wanted"]
    assert settings(shift=(1, 2)).shift == [1, 2]  # what an array of a file is


def test_it_is_told_from_other_partitions():
    assert registry.is_partitioner(ByLabel)
    assert not any(
        map(
            registry.is_partitioner,
            (as_partition(ByLabel), Dataset, registry.find("partition", "iid")),
        )
    )


def test_an_experiment_names_it_as_ones_own_partition():
    experiment = Experiment(
        clients={"count": 3, "partition": "stand_in_partitioners:ByLabel", "wanted": "some"},
        model={"name": "linear"},
        training={"rounds": 1},
        engine={"backend": "inline"},
    )
    with pytest.warns(UserWarning, match="ByLabel gives 1 of 1437 training examples to nobody"):
        partition = fedsim.simulate(experiment).partition
    trained = partition[partition["labelled"] > 0]
    assert (trained["class"] % 3 == trained["client"]).all()
    assert trained["labelled"].sum() == 1436


class TestFlowerFailure:
    @pytest.mark.parametrize(
        ("settings", "error", "line"),
        [
            (
                {"wanted": "more"},
                DataError,
                r"count = 3, but .* ByLabel makes 4 clients; set .* = 4",
            ),
            ({"wanted": "twice"}, DataError, "ByLabel gives some examples to several clients"),
            ({"wanted": "columns"}, DataError, "ByLabel deals out columns, not examples"),
            ({"wanted": "error"}, ConfigError, "ByLabel: ValueError: too few examples"),
        ],
    )
    def test_one_line_says_why(self, settings, error, line):
        with pytest.raises(error, match=line):
            deal(**settings)

    def test_natural_ids_without_groups(self):
        with pytest.raises(DataError, match="the source has no groups of examples"):
            deal(ByNaturalId)

    def test_an_unknown_setting(self):
        line = r"clients\.alpha = 1\.0: unknown"
        with pytest.raises(ConfigError, match=line):
            Experiment(clients={"partition": "stand_in_partitioners:ByLabel", "alpha": 1.0})
