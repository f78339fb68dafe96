import numpy as np

from fedsim.data.digits import digits


def test_split():
    source = digits()
    assert source.x_train.shape == (1437, 1, 8, 8)
    assert source.x_train.dtype == np.uint8
    assert source.x_train.max() == 16
    assert np.bincount(source.y_test).tolist() == [36] * 10
    assert not source.flip


def test_nothing_is_lost_or_shared():
    from sklearn.datasets import load_digits

    source = digits()
    ours = np.concatenate([source.x_train, source.x_test]).reshape(1797, 64)
    theirs = load_digits().data.astype(np.uint8)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs))


def test_tests_are_spread_over_the_file():
    from sklearn.datasets import load_digits

    data = load_digits()
    zeros = data.images[data.target == 0]
    source = digits()
    ours = source.x_test[source.y_test == 0][:, 0]
    # 178 zeros; floor(i * 178 / 36) for i = 0, 1, 2, 3, 35.
    assert len(zeros) == 178
    np.testing.assert_array_equal(ours[[0, 1, 2, 3, 35]], zeros[[0, 4, 9, 14, 173]])
