import numpy as np
import pytest

from fedsim.data import partition
from fedsim.data.federate import federate
from fedsim.data.source import Source
from tests.fedsim.data.test_federate import owned_by, quietly, toy


def test_labelled_examples_are_counted_by_class():
    federation = federate(toy(), num_clients=5, partition=partition.iid, labelled=0.4, seed=1)
    found = federation.labelled_class_counts([3, 0])
    y = federation.source.y_train
    assert found.tolist() == [
        [int((y[federation.labelled(client)] == c).sum()) for c in range(4)] for client in (3, 0)
    ]
    assert federation.labelled_class_counts([]).shape == (0, 4)


@pytest.mark.parametrize("clients", [[3, 0, 3], [], range(5)], ids=["twice", "none", "all"])
def test_clients_looked_up_together_have_what_each_has_alone(clients):
    federation = federate(toy(), num_clients=5, partition=partition.iid, labelled=0.4, seed=1)
    found = federation.labelled_and_unlabelled(clients)
    assert [(labelled.tolist(), unlabelled.tolist()) for labelled, unlabelled in found] == [
        (federation.labelled(client).tolist(), federation.unlabelled(client).tolist())
        for client in clients
    ]
    assert all(np.shares_memory(one, federation.train_index) for one, _ in found)


def test_views_are_not_copies():
    federation = federate(toy(), num_clients=5, partition=partition.iid, labelled=0.5)
    for view in (federation.train(1), federation.labelled(1), federation.unlabelled(1)):
        assert np.shares_memory(view, federation.train_index)
    assert np.shares_memory(federation.test(1), federation.test_index)


class TestNames:
    NAMED = {  # noqa: RUF012
        "group_train": np.arange(120) % 3,
        "class_names": ("a", "b", "c", "two\nlines"),
        "client_names": ("hosp1", "hosp2", "hosp3"),
    }
    CLASSES = ("class,0,a", "class,1,b", "class,2,c", r"class,3,two\nlines")

    def rows(self, source, **options):
        federation = federate(source, num_clients=3, **options)
        header, *rows = federation.names().to_csv(index=False).splitlines()
        assert header == "kind,number,name"
        return tuple(rows)

    def test_of_classes_and_clients(self):
        clients = ("client,0,hosp1", "client,1,hosp2", "client,2,hosp3")
        rows = self.rows(toy(**self.NAMED), partition=partition.group)
        assert rows == self.CLASSES + clients

    def test_other_partitions_make_clients_without_names(self):
        assert self.rows(toy(**self.NAMED), partition=partition.iid) == self.CLASSES

    def test_groups_of_other_numbers_are_named_by_them(self):
        source = toy(group_train=np.arange(120) % 3 * 10)
        rows = self.rows(source, partition=partition.group)
        assert rows == ("client,0,0", "client,1,10", "client,2,20")

    def test_none(self):
        assert self.rows(toy(group_train=np.arange(120) % 3), partition=partition.group) == ()

    def test_a_group_of_which_the_long_tail_leaves_nothing_is_no_client(self):
        source = Source(
            name="toy",
            x_train=np.zeros((22, 1), np.float32),
            y_train=np.repeat([0, 1], [11, 11]),
            x_test=np.zeros((2, 1), np.float32),
            y_test=np.array([0, 1]),
            num_classes=2,
            group_train=np.repeat([0, 1, 2, 3], [5, 6, 1, 10]),
            client_names=("w", "x", "y", "z"),
        )
        options = {"partition": partition.group, "imbalance": 0.1, "seed": 1}
        assert self.rows(source, **options) == ("client,0,w", "client,1,x", "client,2,z")


class TestTable:
    def test_by_hand(self):
        source = Source(
            name="toy",
            x_train=np.zeros((6, 1), np.float32),
            y_train=np.array([0, 0, 0, 0, 2, 1]),
            x_test=np.zeros((4, 1), np.float32),
            y_test=np.array([0, 0, 0, 2]),
            num_classes=3,
        )
        with pytest.warns(UserWarning, match="1 of 3 clients"):
            federation = federate(
                source,
                num_clients=3,
                partition=owned_by([4, 1, 1]),
                labelled=0.5,
            )
        table = federation.table()
        assert table.to_dict("list") == {
            "client": [0, 1, 2],
            "class": [0, 2, 1],
            "labelled": [2, 1, 1],
            "unlabelled": [2, 0, 0],
            "test": [3, 1, 0],
        }
        assert {str(dtype) for dtype in table.dtypes} == {"int64"}

    def test_agrees_with_the_clients(self):
        source = toy()
        federation = quietly(source, num_clients=7, partition=partition.dirichlet, labelled=0.4)
        table = federation.table()
        assert table.equals(table.sort_values(["client", "class"]))
        for column, of_client, labels in (
            ("labelled", federation.labelled, source.y_train),
            ("unlabelled", federation.unlabelled, source.y_train),
            ("test", federation.test, source.y_test),
        ):
            wide = table.pivot_table(column, "client", "class", fill_value=0)
            for k in range(7):
                mine = np.bincount(labels[of_client(k)], minlength=4)
                assert wide.reindex(columns=range(4), fill_value=0).loc[k].tolist() == mine.tolist()

    def test_a_test_class_without_training_examples_has_a_row(self):
        source = toy(group_train=np.arange(120) % 2, group_test=np.arange(60) % 2)
        federation = federate(source, num_clients=2, partition=partition.group)
        assert federation.table()["test"].sum() == 60


class TestFailure:
    @pytest.mark.parametrize("client", [-1, 5])
    def test_no_such_client(self, client):
        federation = federate(toy(), num_clients=5, partition=partition.iid)
        for view in (
            federation.train,
            federation.labelled,
            federation.unlabelled,
            federation.test,
            lambda client: federation.labelled_and_unlabelled([0, client]),
        ):
            with pytest.raises(IndexError, match=f"client {client}: clients are 0..4"):
                view(client)
