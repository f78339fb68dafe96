import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data import partition
from fedsim.data.digits import digits
from fedsim.data.federate import federate
from fedsim.data.source import Source
from fedsim.errors import DataError


def toy(num_train=120, num_test=60, num_classes=4, **groups):
    rng = np.random.default_rng(0)
    return Source(
        name="toy",
        x_train=np.zeros((num_train, 1), np.float32),
        y_train=rng.permutation(np.arange(num_train) % num_classes),
        x_test=np.zeros((num_test, 1), np.float32),
        y_test=rng.permutation(np.arange(num_test) % num_classes),
        num_classes=num_classes,
        **groups,
    )


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return federate(*args, **kwargs)


def content(federation):
    return [
        federation.train_offsets.tolist(),
        federation.train_index.tolist(),
        federation.num_labelled.tolist(),
        federation.test_offsets.tolist(),
        federation.test_index.tolist(),
    ]


def owned_by(sizes):
    """A partition of one's own: client k gets the next ``sizes[k]`` examples."""

    def blocks(y, group, num_clients, rng):
        return np.repeat(np.arange(len(sizes)), sizes)

    return blocks


def test_an_example_may_be_nobodys():
    def mine(y, group, num_clients, rng):
        return np.arange(120) % 4 - 1

    with pytest.warns(UserWarning, match="partition mine gives 30 of 120 training examples to nob"):
        federation = federate(toy(), num_clients=3, partition=mine)
    for client in range(3):
        assert sorted(federation.train(client)) == list(range(client + 1, 120, 4))


def test_a_partition_may_work_in_the_labels_it_is_given():
    def mine(y, group, num_clients, rng):
        owner = y % num_clients
        y[:] = 0
        return owner

    def pure(y, group, num_clients, rng):
        return y % num_clients

    found, expected = (federate(toy(), num_clients=2, partition=one) for one in (mine, pure))
    assert content(found) == content(expected)


class TestFederate:
    @settings(max_examples=60)
    @given(
        st.sampled_from(
            [
                (partition.iid, {}),
                (partition.dirichlet, {"alpha": 0.1}),
                (partition.client_dirichlet, {"alpha": 0.1}),
                (partition.shards, {"shards_per_client": 1}),
                (partition.quantity, {"sigma": 2.0}),
            ]
        ),
        st.integers(1, 20),
        st.sampled_from([1.0, 0.3]),
        st.sampled_from([0.0, 0.3, 1.0, (0.1, 0.6)]),
        st.booleans(),
        st.integers(1, 3),
        st.integers(0, 9),
    )
    def test_invariants(self, split, num_clients, imbalance, labelled, each, least, seed):
        source = toy(200)
        chosen, options = split
        arguments = {
            "num_clients": num_clients,
            "partition": chosen,
            "options": options,
            "imbalance": imbalance,
            "labelled": labelled,
            "label_each_class": each,
            "min_examples": least,
            "seed": seed,
        }
        federation = quietly(source, **arguments)

        sizes = np.diff(federation.train_offsets)
        assert federation.num_clients == num_clients == len(sizes)
        assert sizes.min() >= least
        assert federation.train_offsets[0] == 0
        assert federation.train_offsets[-1] == len(federation.train_index)
        # Every example that the long tail keeps has one owner: 50 * 0.3^(c/3).
        assert len(np.unique(federation.train_index)) == len(federation.train_index)
        expected = [50, 50, 50, 50] if imbalance == 1 else [50, 33, 22, 15]
        assert federation.class_counts.tolist() == expected
        assert (federation.num_labelled <= sizes).all()
        for k in range(num_clients):
            train = federation.train(k)
            parts = [*federation.labelled(k), *federation.unlabelled(k)]
            np.testing.assert_array_equal(train, parts)
            assert len(federation.labelled(k)) == federation.num_labelled[k]
            classes = set(source.y_train[train])
            if each:
                distinct = len(set(source.y_train[federation.labelled(k)]))
                assert distinct == min(len(classes), federation.num_labelled[k])
            test = federation.test(k)
            assert len(np.unique(test)) == len(test) > 0
            assert set(source.y_test[test]) <= classes
        assert content(federation) == content(quietly(source, **arguments))

    def test_seeds_differ(self):
        a, b = (federate(toy(), num_clients=5, partition=partition.iid, seed=s) for s in (0, 1))
        assert content(a)[1] != content(b)[1]
        assert content(a)[4] != content(b)[4]

    def test_seeds_draw_other_tests_for_clients_with_the_same_examples(self):
        dealt = {"num_clients": 3, "partition": owned_by([40, 40, 40])}
        a, b = (federate(toy(), seed=seed, **dealt) for seed in (1, 2))
        for k in range(3):
            assert set(a.train(k)) == set(b.train(k))
            assert set(a.test(k)) != set(b.test(k))

    def test_labels_do_not_change_who_holds_what(self):
        shares = (0.1, 0.7)
        a, b = (
            federate(toy(), num_clients=5, partition=partition.iid, labelled=share)
            for share in shares
        )
        for k in range(5):
            assert set(a.train(k)) == set(b.train(k))
            np.testing.assert_array_equal(a.test(k), b.test(k))

    def test_unlabelled_clients(self):
        federation = federate(
            toy(), num_clients=10, partition=partition.iid, labelled=0.5, unlabelled_clients=0.3
        )
        assert sorted(federation.num_labelled.tolist()) == [0, 0, 0] + [6] * 7

    def test_labels_fall_on_any_example(self):
        share = np.zeros(120)
        for seed in range(100):
            federation = federate(
                toy(), num_clients=6, partition=partition.iid, labelled=0.5, seed=seed
            )
            for k in range(6):
                share[federation.labelled(k)] += 1
        # Binomial(100, 1/2): 50 +- 5 * 5.
        assert (abs(share - 50) <= 25).all()

    def test_a_partition_of_ones_own_with_options(self):
        def every(y, group, num_clients, rng, *, step):
            return np.arange(len(y)) // step % num_clients

        federation = federate(toy(8), num_clients=2, partition=every, options={"step": 2})
        assert sorted(federation.train(1)) == [2, 3, 6, 7]


class TestFill:
    def test_by_hand(self):
        # 2 missing for client 4: client 0 alone, from 50 to 48.
        with pytest.warns(UserWarning, match="had fewer than") as caught:
            federation = federate(
                toy(117),
                num_clients=5,
                partition=owned_by([50, 45, 20, 2, 0]),
                min_examples=2,
            )
        assert np.diff(federation.train_offsets).tolist() == [48, 45, 20, 2, 2]
        (warning,) = caught
        assert str(warning.message) == (
            "1 of 5 clients had fewer than clients.min_examples = 2 training examples; 2 examples"
            " were moved to them from the largest clients"
        )
        assert warning.filename == __file__

    def test_the_largest_are_levelled_no_further_than_needed(self):
        federation = quietly(
            toy(59), num_clients=6, partition=owned_by([20, 19, 18, 2, 0, 0]), min_examples=3
        )
        # 1 + 3 + 3 = 7 missing: to 16 gives 4 + 3 + 2 = 9, so two of them keep 17.
        sizes = np.diff(federation.train_offsets)
        assert sorted(sizes.tolist()) == [3, 3, 3, 16, 17, 17]

    def test_who_keeps_one_more_is_drawn(self):
        fewer = np.zeros(3)
        for seed in range(300):
            federation = quietly(
                toy(59),
                num_clients=6,
                partition=owned_by([20, 19, 18, 2, 0, 0]),
                min_examples=3,
                seed=seed,
            )
            fewer += np.diff(federation.train_offsets)[:3] == 16
        assert fewer.sum() == 300
        # Binomial(300, 1/3): 100 +- 5 * 8.2.
        assert (abs(fewer - 100) < 41).all()

    def test_donors_keep_the_least(self):
        federation = quietly(
            toy(12), num_clients=6, partition=owned_by([6, 6, 0, 0, 0, 0]), min_examples=2
        )
        assert np.diff(federation.train_offsets).tolist() == [2] * 6

    def test_nothing_to_fill_moves_nothing(self):
        sizes = [40, 1, 7, 12]
        federation = federate(toy(60), num_clients=4, partition=owned_by(sizes))
        assert np.diff(federation.train_offsets).tolist() == sizes

    def test_any_example_of_a_donor_may_go(self):
        gone = np.zeros(10)
        for seed in range(500):
            federation = quietly(toy(10), num_clients=3, partition=owned_by([10, 0, 0]), seed=seed)
            gone[federation.train(1)] += 1
        # Binomial(500, 1/10): 50 +- 5 * 6.7.
        assert (abs(gone - 50) < 34).all()

    def test_does_not_write_to_what_the_partition_returned(self):
        owner = np.zeros(10, np.int64)
        quietly(toy(10), num_clients=2, partition=lambda y, group, num_clients, rng: owner)
        assert not owner.any()


class TestGroups:
    GROUPS = np.arange(120) % 3 * 10  # groups 0, 10, 20

    def test_tests_of_ones_own_group(self):
        group_test = np.array([10, 0, 99, 20, 10, 5] * 10)
        source = toy(group_train=self.GROUPS, group_test=group_test)
        federation = federate(source, num_clients=3, partition=partition.group)
        for k in range(3):
            assert set(self.GROUPS[federation.train(k)]) == {10 * k}
            assert sorted(federation.test(k)) == np.flatnonzero(group_test == 10 * k).tolist()

    def test_a_group_without_tests(self):
        source = toy(group_train=self.GROUPS, group_test=np.arange(60) % 2 * 20)
        with pytest.warns(UserWarning, match="1 of 3 clients have no local test example") as caught:
            federation = federate(source, num_clients=3, partition=partition.group)
        assert len(caught) == 1
        assert np.diff(federation.test_offsets).tolist() == [30, 0, 30]

    def test_without_group_test_they_follow_the_classes(self):
        federation = federate(
            toy(group_train=self.GROUPS), num_clients=3, partition=partition.group
        )
        assert np.diff(federation.test_offsets).tolist() == [20, 20, 20]

    def test_other_partitions_do_not_use_group_test(self):
        source = toy(group_train=self.GROUPS, group_test=np.full(60, 7))
        federation = federate(source, num_clients=3, partition=partition.iid)
        assert np.diff(federation.test_offsets).tolist() == [20, 20, 20]

    def test_groups_follow_the_long_tail(self):
        # What the long tail leaves of each example's group goes with it.
        source = toy(group_train=self.GROUPS)
        federation = federate(
            source, num_clients=3, partition=partition.group, imbalance=0.2, profile="step"
        )
        for k in range(3):
            assert set(self.GROUPS[federation.train(k)]) == {10 * k}
        assert federation.class_counts.tolist() == [30, 30, 6, 6]


class TestLocalTests:
    def test_clients_without_tests_are_warned_of_once(self):
        source = Source(
            name="toy",
            x_train=np.zeros((6, 1), np.float32),
            y_train=np.array([0, 0, 1, 1, 2, 2]),
            x_test=np.zeros((3, 1), np.float32),
            y_test=np.array([0, 0, 0]),
            num_classes=3,
        )
        with pytest.warns(UserWarning, match="2 of 3 clients have no local test example") as caught:
            federation = federate(source, num_clients=3, partition=owned_by([2, 2, 2]))
        assert len(caught) == 1
        assert [len(federation.test(k)) for k in range(3)] == [3, 0, 0]

    def test_of_digits_iid(self):
        federation = federate(digits(), num_clients=10, partition=partition.iid)
        assert 355 <= federation.test_offsets[-1] <= 365


class TestFailure:
    def test_more_clients_than_digits(self):
        with pytest.raises(DataError) as error:
            federate(digits(), num_clients=10_000, partition=partition.dirichlet)
        assert str(error.value) == (
            "clients.count = 10000, but digits has 1437 training examples after the long tail and"
            " clients.min_examples = 1; at most 1437 clients"
        )

    def test_min_examples_counts(self):
        with pytest.raises(DataError, match="at most 24 clients"):
            federate(toy(), num_clients=25, partition=partition.iid, min_examples=5)

    @pytest.mark.parametrize("value", [0, -3, 1.5, "7", True])
    @pytest.mark.parametrize(
        ("argument", "key"),
        [("num_clients", "clients.count"), ("min_examples", "clients.min_examples")],
    )
    def test_counts(self, argument, key, value):
        arguments = {"num_clients": 3, argument: value}
        with pytest.raises(DataError, match=f"^{key} = {value!r}: .*at least 1"):
            federate(toy(), partition=partition.iid, **arguments)

    def test_unknown_option(self):
        with pytest.raises(
            DataError, match=r"clients\.sigma: partition dirichlet has no such .* has alpha"
        ):
            federate(toy(), num_clients=3, partition=partition.dirichlet, options={"sigma": 1})
        with pytest.raises(DataError, match=r"clients\.alpha: partition iid .* it has none"):
            federate(toy(), num_clients=3, partition=partition.iid, options={"alpha": 1})

    def test_missing_option(self):
        def mine(y, group, num_clients, rng, *, step):
            return y

        with pytest.raises(DataError, match=r"clients\.step: partition mine needs this option"):
            federate(toy(), num_clients=3, partition=mine)

    @pytest.mark.parametrize(
        ("mine", "message"),
        [
            (lambda y, num_clients, rng: y, "too many positional arguments"),
            (lambda y, group, num_clients, rng, step: y, "missing a required argument: 'step'"),
        ],
    )
    def test_parameters_of_ones_own_partition(self, mine, message):
        with pytest.raises(DataError) as error:
            federate(toy(), num_clients=3, partition=mine)
        assert str(error.value) == (
            f"partition <lambda>: {message}; it is called as f(y, group, num_clients, rng, *,"
            " options)"
        )

    @pytest.mark.parametrize(
        ("owner", "message"),
        [
            (np.zeros(119, int), r"returned int64 \[119\]; must be .* integers \[120\]"),
            (np.zeros((120, 1), int), r"returned int64 \[120, 1\]"),
            (np.zeros(120), r"returned float64 \[120\]"),
            (None, "returned object"),
            (np.arange(120), r"gives example 3 to client 3; clients are 0\.\.2"),
            (
                np.arange(120) - 2,
                "gives example 0 to client -2; clients are 0..2, and -1 is nobody",
            ),
        ],
    )
    def test_result_of_ones_own_partition(self, owner, message):
        def mine(y, group, num_clients, rng):
            return owner

        with pytest.raises(DataError, match=f"^partition mine: {message}"):
            federate(toy(), num_clients=3, partition=mine)

    def test_too_many_examples_for_nobody(self):
        def mine(y, group, num_clients, rng):
            return np.where(np.arange(120) < 7, np.arange(120) % 3, -1)

        line = "= 3, but partition mine deals out 7 .*min_examples = 3; at most 2 clients"
        with pytest.warns(UserWarning, match="113 of 120"), pytest.raises(DataError, match=line):
            federate(toy(), num_clients=3, partition=mine, min_examples=3)

    def test_group_too_small(self):
        groups = np.repeat([4, 8, 9], [100, 3, 17])
        with pytest.raises(DataError, match=r"= 5, but group 8 \(client 1\) has 3 .* at most 3"):
            federate(
                toy(group_train=groups), num_clients=3, partition=partition.group, min_examples=5
            )

    def test_a_named_group_too_small(self):
        groups = np.repeat([0, 1, 2], [100, 3, 17])
        source = toy(group_train=groups, client_names=("hosp1", "hosp10", "hosp2"))
        line = r"= 5, but group hosp10 \(client 1\) has 3 training examples; at most 3"
        with pytest.raises(DataError, match=line):
            federate(source, num_clients=3, partition=partition.group, min_examples=5)

    def test_groups_of_a_source_without(self):
        with pytest.raises(DataError, match="no groups"):
            federate(toy(), num_clients=10_000, partition=partition.group)

    def test_count_of_groups(self):
        with pytest.raises(DataError, match=r"set clients\.count = 2"):
            federate(
                toy(group_train=np.arange(120) % 2), num_clients=500, partition=partition.group
            )
