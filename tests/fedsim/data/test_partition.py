import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data import partition
from fedsim.errors import DataError

WITH_ALPHA = [partition.dirichlet, partition.client_dirichlet]
WITHOUT_GROUPS = [partition.iid, *WITH_ALPHA, partition.shards, partition.quantity]


def rng(seed=0):
    return np.random.default_rng(seed)


def counts(owner, y, num_clients):
    """Count examples [K, C]."""
    table = np.zeros((num_clients, y.max() + 1), int)
    np.add.at(table, (owner, y), 1)
    return table


def mixed(sizes, seed=0):
    return rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


class TestAll:
    @given(
        st.sampled_from(WITHOUT_GROUPS),
        st.lists(st.integers(0, 40), min_size=2, max_size=8).filter(lambda s: sum(s) >= 40),
        st.integers(1, 20),
        st.integers(0, 99),
    )
    def test_each_example_has_one_owner_and_the_seed_decides(self, f, sizes, num_clients, seed):
        y = mixed(sizes)
        owner = f(y, None, num_clients, rng(seed))
        assert owner.shape == y.shape
        assert owner.dtype == np.int64
        assert owner.min() >= 0
        assert owner.max() < num_clients
        np.testing.assert_array_equal(owner, f(y, None, num_clients, rng(seed)))

    @pytest.mark.parametrize("f", WITHOUT_GROUPS)
    def test_another_seed_gives_another_partition(self, f):
        y = mixed([100] * 4)
        assert (f(y, None, 10, rng(1)) != f(y, None, 10, rng(2))).any()

    @pytest.mark.parametrize("f", WITHOUT_GROUPS)
    def test_neighbours_in_the_file_part(self, f):
        # Were runs of the file dealt out, the 100 examples of a class would have few changes of
        # owner; at random two neighbours agree with probability sum_k p_k^2, far from 1.
        y = np.zeros(4000, int)
        owner = f(y, None, 50, rng(), **({"alpha": 100.0} if f in WITH_ALPHA else {}))
        assert (np.diff(owner) != 0).mean() > 0.8


class TestUnknownLabels:
    @given(
        st.sampled_from([*WITH_ALPHA, partition.shards]),
        st.integers(1, 8),
        st.integers(0, 300),
        st.integers(0, 99),
    )
    def test_they_follow_the_others_in_proportion(self, f, num_clients, unknown, seed):
        y = np.append(mixed([30, 20, 10]), np.full(unknown, -1))
        shuffled = rng(seed + 1).permutation(len(y))
        y = y[shuffled]
        owner = f(y, None, num_clients, rng(seed))
        known = owner[y >= 0]
        np.testing.assert_array_equal(known, f(y[y >= 0], None, num_clients, rng(seed)))
        expected = np.bincount(known, minlength=num_clients) * unknown / 60
        found = np.bincount(owner[y < 0], minlength=num_clients)
        assert (np.abs(found - expected) < 1).all()
        assert found.sum() == unknown

    @pytest.mark.parametrize("f", [partition.iid, partition.quantity])
    def test_they_are_as_others_to_those_that_do_not_ask(self, f):
        y = mixed([50, 50])
        owner = f(np.where(y > 0, -1, y), None, 7, rng(4))
        np.testing.assert_array_equal(owner, f(y, None, 7, rng(4)))


class TestIid:
    @given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 99))
    def test_sizes_differ_by_at_most_one(self, num_examples, num_clients, seed):
        owner = partition.iid(np.zeros(num_examples, int), None, num_clients, rng(seed))
        assert np.ptp(np.bincount(owner, minlength=num_clients)) <= 1


class TestDirichlet:
    @pytest.mark.parametrize("alpha", [1e-300, 1e-9, 1e-3, 0.05])
    def test_tiny_alpha_gives_a_class_to_one_client(self, alpha):
        y = mixed([200] * 5)
        table = counts(partition.dirichlet(y, None, 8, rng(3), alpha=alpha), y, 8)
        assert table.sum() == 1000
        if alpha <= 1e-3:
            assert (table.max(axis=0) >= 195).all()

    @pytest.mark.parametrize("alpha", [1e9, 1e300])
    def test_huge_alpha_gives_equal_shares(self, alpha):
        y = mixed([1000, 400])
        table = counts(partition.dirichlet(y, None, 10, rng(), alpha=alpha), y, 10)
        assert (abs(table - [100, 40]) <= 1).all()

    def test_one_client_has_all(self):
        assert not partition.dirichlet(mixed([5, 5]), None, 1, rng()).any()

    def test_spread_is_that_of_the_distribution(self):
        # E[sum_k p_k^2] = (alpha + 1) / (K alpha + 1); 400 classes, standard error about 1%.
        y = np.repeat(np.arange(400), 500)
        for alpha in (0.1, 0.5, 5.0):
            table = counts(partition.dirichlet(y, None, 20, rng(), alpha=alpha), y, 20)
            measured = ((table / 500) ** 2).sum(axis=0).mean()
            assert measured == pytest.approx((alpha + 1) / (20 * alpha + 1), rel=0.06)

    def test_shares_below_one_example_favour_nobody(self):
        # 1000 equal clients, 10 classes of 100: were shares rounded along a fixed order, 100
        # clients would have all; at random (1 - 0.1)^10 = 35% of the clients stay empty.
        y = np.repeat(np.arange(10), 100)
        owner = partition.dirichlet(y, None, 1000, rng(), alpha=1e9)
        empty = 1000 - len(np.unique(owner))
        assert 250 < empty < 450


class TestClientDirichlet:
    @pytest.mark.parametrize("alpha", [1e-300, 1e-9, 1e-3])
    def test_tiny_alpha_gives_a_client_one_class(self, alpha):
        y = mixed([200] * 5)
        table = counts(partition.client_dirichlet(y, None, 40, rng(1), alpha=alpha), y, 40)
        assert table.sum() == 1000
        assert ((table > 0).sum(axis=1) <= 1).mean() > 0.9

    def test_tiny_alpha_with_fewer_clients_than_classes(self):
        y = mixed([10] * 50)
        owner = partition.client_dirichlet(y, None, 3, rng(), alpha=1e-9)
        # A class nobody drew goes to one client as a whole.
        assert ((counts(owner, y, 3) > 0).sum(axis=0) == 1).all()

    def test_huge_alpha_gives_equal_shares(self):
        y = mixed([1000, 400, 100])
        table = counts(partition.client_dirichlet(y, None, 10, rng(), alpha=1e9), y, 10)
        assert (abs(table - [100, 40, 10]) <= 1).all()

    def test_spread_is_that_of_the_distribution(self):
        # 4000 clients that share 10 balanced classes have about 100 examples each, with
        # E[sum_c p[c]^2] = (alpha + 1) / (C alpha + 1); the sizes weigh the clients alike.
        y = np.repeat(np.arange(10), 40_000)
        table = counts(partition.client_dirichlet(y, None, 4000, rng(), alpha=0.5), y, 4000)
        mix = table / table.sum(axis=1, keepdims=True)
        assert (mix**2).sum(axis=1).mean() == pytest.approx(1.5 / 6, rel=0.05)

    def test_two_classes_follow_the_arcsine_law_at_both_ends(self):
        # Beta(1/2, 1/2): P(p < 0.1) = P(p > 0.9) = 2/pi asin(sqrt(0.1)) = 0.2048; standard error
        # 0.0064 for 4000 clients, plus that of about 100 examples each.
        y = np.repeat([0, 1], 200_000)
        table = counts(partition.client_dirichlet(y, None, 4000, rng(), alpha=0.5), y, 4000)
        share = table[:, 0] / table.sum(axis=1)
        assert (share < 0.1).mean() == pytest.approx(0.2048, abs=0.03)
        assert (share > 0.9).mean() == pytest.approx(0.2048, abs=0.03)


class TestShards:
    def test_two_shards_each_by_hand(self):
        y = mixed([50] * 10)
        table = counts(partition.shards(y, None, 25, rng()), y, 25)
        # 50 shards of 10 examples, 5 to a class: nobody has more than two classes.
        assert (table.sum(axis=1) == 20).all()
        assert set(np.unique(table)) <= {0, 10, 20}

    @given(st.integers(1, 12), st.integers(1, 4), st.integers(48, 100))
    def test_sizes(self, num_clients, per_client, num_examples):
        y = rng().integers(0, 5, num_examples)
        owner = partition.shards(y, None, num_clients, rng(), shards_per_client=per_client)
        shard, more = divmod(num_examples, num_clients * per_client)
        sizes = np.bincount(owner, minlength=num_clients)
        assert sizes.min() >= shard * per_client
        assert sizes.max() <= (shard + (more > 0)) * per_client


class TestQuantity:
    def test_sigma_zero_is_equal(self):
        sizes = np.bincount(partition.quantity(mixed([50, 53]), None, 10, rng(), sigma=0))
        assert sizes.sum() == 103
        assert set(sizes) == {10, 11}

    @given(st.integers(1, 300), st.integers(1, 4))
    def test_sigma_zero_is_equal_where_it_can_be(self, num_clients, each):
        y = np.zeros(num_clients * each, int)
        sizes = np.bincount(partition.quantity(y, None, num_clients, rng(), sigma=0))
        assert (sizes == each).all()

    def test_log_sizes_have_the_standard_deviation(self):
        y = np.zeros(2_000_000, int)
        sizes = np.bincount(partition.quantity(y, None, 2000, rng(), sigma=0.7), minlength=2000)
        assert np.log(sizes).std() == pytest.approx(0.7, rel=0.05)

    def test_largest_sigma(self):
        sizes = np.bincount(partition.quantity(mixed([500, 500]), None, 1000, rng(), sigma=10))
        assert sizes.sum() == 1000
        assert np.sort(sizes)[-20:].sum() > 990

    def test_class_mix_is_that_of_the_whole(self):
        y = mixed([30_000, 10_000])
        table = counts(partition.quantity(y, None, 10, rng(), sigma=1.0), y, 10)
        share = table[:, 0] / table.sum(axis=1)
        error = np.sqrt(0.75 * 0.25 / table.sum(axis=1))
        assert (abs(share - 0.75) < 5 * error).all()


class TestGroup:
    def test_in_order_of_the_groups_numbers(self):
        groups = np.array([40, 7, 7, 12, 40])
        assert partition.group(np.zeros(5, int), groups, 3, rng()).tolist() == [2, 0, 0, 1, 2]


class TestDirichletFailure:
    @pytest.mark.parametrize("f", WITH_ALPHA)
    @pytest.mark.parametrize("alpha", [-1, 0, float("nan"), float("inf"), "0.5", None, True])
    def test_alpha(self, f, alpha):
        with pytest.raises(DataError, match=r"^clients\.alpha = .*must be a number above 0$"):
            f(mixed([5, 5]), None, 2, rng(), alpha=alpha)


class TestShardsFailure:
    @pytest.mark.parametrize("count", [0, -1, 1.5, "2"])
    def test_shards_per_client(self, count):
        with pytest.raises(DataError, match=r"^clients\.shards_per_client = .*at least 1"):
            partition.shards(mixed([5, 5]), None, 2, rng(), shards_per_client=count)

    def test_more_shards_than_examples(self):
        with pytest.raises(DataError, match="4 clients would need 12 shards, but 10 examples have"):
            partition.shards(mixed([5, 5]), None, 4, rng(), shards_per_client=3)


class TestQuantityFailure:
    @pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf"), 10.1, "1"])
    def test_sigma(self, sigma):
        with pytest.raises(DataError, match=r"^clients\.sigma = .*from 0 to 10"):
            partition.quantity(mixed([5, 5]), None, 2, rng(), sigma=sigma)


class TestGroupFailure:
    def test_no_groups(self):
        with pytest.raises(DataError, match="the source has no groups"):
            partition.group(np.zeros(3, int), None, 3, rng())

    def test_other_count(self):
        with pytest.raises(DataError, match=r"= 5, .* the 2 groups; set clients\.count = 2"):
            partition.group(np.zeros(3, int), np.array([4, 4, 9]), 5, rng())
