"""Each leaf is taken once, whoever asks and whenever."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from hypothesis import given
from hypothesis import strategies as st

from fedsim.engine.claims import Claims

SHARES = st.lists(st.integers(0, 9), min_size=1, max_size=4)


def own(shares, worker):
    begin = sum(shares[:worker])
    return range(begin, begin + shares[worker])


@given(shares=SHARES, data=st.data())
def test_each_leaf_is_taken_once_and_by_its_owner_first(tmp_path_factory, shares, data):
    with closing(Claims(tmp_path_factory.mktemp("claims") / "claims")) as claims:
        begun = claims.begin(sum(shares))
        taken = []
        while len(taken) < sum(shares):
            worker = data.draw(st.integers(0, len(shares) - 1))
            left = [
                [p for p in own(shares, other) if p not in taken] for other in range(len(shares))
            ]
            found = claims.take(begun, worker, shares)
            if left[worker]:
                assert found == left[worker][: (len(left[worker]) + 1) // 2]
            else:
                (place,) = found
                assert any(place == of[-1] for of in left if len(of) == max(map(len, left)))
            taken += found
        assert sorted(taken) == list(range(sum(shares)))
        assert claims.take(begun, 0, shares) == []


@given(shares=SHARES.filter(sum), data=st.data())
def test_what_a_dead_worker_took_is_free_again(tmp_path_factory, shares, data):
    with closing(Claims(tmp_path_factory.mktemp("claims") / "claims")) as claims:
        begun = claims.begin(sum(shares))
        taken = {}
        for worker in data.draw(st.lists(st.integers(0, len(shares) - 1), max_size=20)):
            taken.setdefault(worker, []).extend(claims.take(begun, worker, shares))
        dead = data.draw(st.integers(0, len(shares) - 1))
        lost = taken.pop(dead, [])
        claims.release(dead)
        again = []
        while found := claims.take(begun, dead, shares):
            again += found
        assert set(lost) <= set(again)
        assert sorted([*again, *(place for of in taken.values() for place in of)]) == list(
            range(sum(shares))
        )


def test_who_is_still_in_an_earlier_round_gets_nothing(tmp_path):
    path = tmp_path / "claims"
    with closing(Claims(path)) as claims, closing(Claims(path)) as other:
        first = claims.begin(3)
        assert other.take(first, 0, [3]) == [0, 1]
        second = claims.begin(2)
        assert other.take(first, 0, [3]) == []
        assert other.take(second, 0, [2]) == [0]


def test_those_who_take_at_the_same_time_never_take_the_same(tmp_path):
    shares = [400, 30, 210]
    path = tmp_path / "claims"
    with closing(Claims(path)) as claims:
        begun = claims.begin(sum(shares))
    start = threading.Barrier(3)

    def take_all(worker):
        with closing(Claims(path)) as claims:  # with a lock of its own, as in another process
            start.wait()
            return [*iter(lambda: claims.take(begun, worker, shares), [])]

    with ThreadPoolExecutor(3) as pool:
        taken = [places for of in pool.map(take_all, range(3)) for places in of]
    assert sorted(place for places in taken for place in places) == list(range(sum(shares)))
