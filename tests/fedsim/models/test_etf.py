"""The simplex ETF, the sparse one of FedLoGe, and what is measured of them."""

import math
import warnings
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import ConfigError, DataError
from fedsim.models.etf import WARN_ABOVE, etf, geometry, sparse_etf


def rng(seed=0):
    return np.random.default_rng(seed)


def in_steps(steps, *arguments, **options):
    """Return a sparse ETF; the recipe "angles" takes other steps than the authors'."""
    with mock.patch("fedsim.models.etf.ANGLES_STEPS", steps):
        return sparse_etf(*arguments, **options)


def angles_by_loops(weight):
    """Return the angle of every pair of rows, in degrees."""
    rows = [np.asarray(row, np.float64) for row in weight]
    return [
        math.degrees(math.acos(a @ b / math.sqrt((a @ a) * (b @ b))))
        for i, a in enumerate(rows)
        for b in rows[i + 1 :]
    ]


def cosine_error(weight):
    """Return the mean squared distance of the pairs' cosines from the ideal."""
    cosines = np.cos(np.radians(angles_by_loops(weight)))
    return np.mean((cosines + 1 / (len(weight) - 1)) ** 2)


def angle_loss(weight, norm):
    """Return the authors' objective of a classifier [C, D], in NumPy."""
    m = np.asarray(weight, np.float64)
    norms = np.sqrt((m * m).sum(axis=1))
    cosine = (m / norms[:, None]) @ (m / norms[:, None]).T
    np.fill_diagonal(cosine, -1)
    return ((norms - norm) ** 2).sum() - np.arccos(cosine.max(axis=1)).mean()


@pytest.mark.parametrize("num_classes", [2, 3])
def test_etf_is_the_formula(num_classes):
    m = etf(4, num_classes, rng()).numpy()
    # Two classes: I - 11^T/2 = [[1, -1], [-1, 1]] / 2 and sqrt(2/1), so m_0 = (p_0 - p_1) / sqrt(2)
    # and m_1 = -m_0. Three: (2 p_c - the other two) / 3 times sqrt(3/2).
    p, r = np.linalg.qr(rng().standard_normal((4, num_classes)))
    p = [p[:, c] if r[c, c] > 0 else -p[:, c] for c in range(num_classes)]
    if num_classes == 2:
        expected = [(p[0] - p[1]) / math.sqrt(2), (p[1] - p[0]) / math.sqrt(2)]
    else:
        others = [p[1] + p[2], p[0] + p[2], p[0] + p[1]]
        expected = [(2 * a - b) / 3 * math.sqrt(3 / 2) for a, b in zip(p, others, strict=True)]
    assert m.dtype == np.float64
    np.testing.assert_allclose(m, expected, atol=1e-14)


@given(st.integers(2, 40), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_etf_has_unit_rows_and_one_cosine(num_classes, more, seed):
    m = etf(num_classes + more, num_classes, rng(seed)).numpy()
    gram = np.full((num_classes, num_classes), -1 / (num_classes - 1))
    np.fill_diagonal(gram, 1)
    np.testing.assert_allclose(m @ m.T, gram, atol=1e-13)
    np.testing.assert_allclose(m.sum(axis=0), 0, atol=1e-13)


def test_etf_is_turned_by_its_seed():
    assert torch.equal(etf(8, 3, rng(1)), etf(8, 3, rng(1)))
    assert not torch.allclose(etf(8, 3, rng(1)), etf(8, 3, rng(2)))


def test_sparse_etf_of_cifar100_is_exact():
    weight = sparse_etf(512, 100, rng())
    assert weight.shape == (100, 512)
    assert weight.dtype == torch.float32
    assert not weight.requires_grad
    assert (weight == 0).sum() == 30_720  # 0.6 * 51,200
    np.testing.assert_allclose(np.linalg.norm(weight.double(), axis=1), 0.1, rtol=1e-6)
    ideal = math.degrees(math.acos(-1 / 99))
    np.testing.assert_allclose(angles_by_loops(weight), ideal, atol=1e-3)


# Shares of zeros at which these sizes have an exact solution.
@pytest.mark.parametrize(
    ("features", "num_classes", "sparsity", "norm"),
    [
        (64, 10, 0.6, 0.1),
        (128, 10, 0.75, 2.0),
        (1024, 4, 0.6, 0.1),
        (24, 3, 0.5, 0.01),
        (20, 2, 0.6, 0.1),
        (10, 10, 0.1, 1.0),
    ],
)
def test_sparse_etf_is_exact_at_many_sizes(features, num_classes, sparsity, norm):
    weight = sparse_etf(features, num_classes, rng(3), sparsity=sparsity, norm=norm)
    assert (weight == 0).sum() == round(sparsity * features * num_classes)
    np.testing.assert_allclose(np.linalg.norm(weight.double(), axis=1), norm, rtol=1e-6)
    ideal = math.degrees(math.acos(-1 / (num_classes - 1)))
    np.testing.assert_allclose(angles_by_loops(weight), ideal, atol=1e-3)


def test_without_zeros_it_is_the_etf_itself():
    weight = sparse_etf(12, 5, rng(), sparsity=0, norm=1)
    np.testing.assert_allclose(weight, etf(12, 5, rng()), rtol=1e-6)


@settings(max_examples=40)
@given(
    st.integers(2, 8),
    st.integers(0, 12),
    st.floats(0, 0.95),
    st.sampled_from(["gram", "angles"]),
    st.integers(0, 2**32 - 1),
)
def test_zeros_are_counted_exactly_and_no_class_is_empty(num_classes, more, sparsity, recipe, seed):
    features = num_classes + more
    zeros = round(sparsity * features * num_classes)
    if features * num_classes - zeros < num_classes:
        zeros = features * num_classes - num_classes
        sparsity = zeros / (features * num_classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # most of these have no exact solution
        weight = in_steps(3, features, num_classes, rng(seed), sparsity=sparsity, recipe=recipe)
    assert (weight == 0).sum() == zeros
    assert (weight != 0).any(dim=1).all()


def test_zeros_are_spread_evenly():
    # One step of the authors' recipe is the quickest way to the zeros.
    draw = partial(in_steps, 1, 8, 2, sparsity=0.25, recipe="angles")
    zeros = np.mean([(draw(rng(seed)) == 0).numpy() for seed in range(300)], axis=0)
    # 300 draws of a share of 0.25 have a standard deviation of 0.025.
    assert np.all(np.abs(zeros - 0.25) < 0.1)


@pytest.mark.parametrize("recipe", ["gram", "angles"])
def test_the_same_seed_gives_the_same_weights(recipe):
    torch.manual_seed(1)
    first = in_steps(20, 32, 5, rng(7), recipe=recipe)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = in_steps(20, 32, 5, rng(7), recipe=recipe)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, in_steps(20, 32, 5, rng(8), recipe=recipe))


def test_without_an_exact_solution_it_warns_and_returns_the_best():
    with pytest.warns(UserWarning, match=r"^method\.sparsity = 0\.9: .*no exact sparse") as caught:
        weight = sparse_etf(23, 20, rng(), sparsity=0.9)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "\n" not in message
    ideal = math.degrees(math.acos(-1 / 19))
    worst = max(abs(angle - ideal) for angle in angles_by_loops(weight))
    assert worst > WARN_ABOVE
    assert f"{worst:.3g} degrees off" in message
    assert caught[0].filename == __file__
    np.testing.assert_allclose(np.linalg.norm(weight.double(), axis=1), 0.1, rtol=1e-6)
    assert (weight == 0).sum() == 414  # 0.9 * 460
    # The cosines are nearer to the ideal than those of the masked ETF that it starts from.
    start = etf(23, 20, rng()) * (weight != 0)
    assert cosine_error(weight) < 0.7 * cosine_error(start)


class TestAnglesRecipe:
    def test_starts_from_the_masked_etf_and_moves_by_the_learning_rate(self):
        weight = in_steps(1, 32, 6, rng(), recipe="angles")
        p = np.linalg.qr(rng().random((32, 6)))[0]
        start = math.sqrt(6 / 5) * (p @ (np.eye(6) - 1 / 6)).T * (weight != 0).numpy()
        # Adam's first step is lr * sign(gradient) wherever the gradient isn't tiny.
        steps = np.abs(weight.numpy() - start)[weight != 0]
        np.testing.assert_allclose(steps, 1e-4, atol=2e-6)

    def test_lowers_its_loss_and_keeps_the_zeros(self):
        few, many = (in_steps(n, 32, 6, rng(), recipe="angles") for n in (1, 200))
        assert torch.equal(few == 0, many == 0)
        assert (many == 0).sum() == round(0.6 * 32 * 6)
        assert angle_loss(many, 0.1) < angle_loss(few, 0.1) - 0.1

    def test_norms_come_to_the_one_asked_for(self):
        weight = in_steps(3000, 64, 4, rng(), recipe="angles", norm=0.5)
        np.testing.assert_allclose(np.linalg.norm(weight, axis=1), 0.5, atol=0.03)
        assert weight.dtype == torch.float32
        assert not weight.requires_grad

    def test_class_0_points_away_from_positive_features(self):
        # The authors' P is the QR of positive numbers; what "gram" draws has no such direction.
        ones = np.ones(512) / math.sqrt(512)
        for seed in range(3):
            theirs = in_steps(300, 512, 10, rng(seed), recipe="angles").numpy()
            cosines = theirs @ ones / np.linalg.norm(theirs, axis=1)
            assert cosines[0] < -0.3
            assert abs(cosines[1:].mean()) < 0.1
            ours = sparse_etf(512, 10, rng(seed)).numpy()
            assert np.abs(ours @ ones / 0.1).max() < 0.2

    def test_does_not_warn_however_far_it_is(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            weight = in_steps(1, 23, 20, rng(), sparsity=0.9, recipe="angles")
        assert geometry(weight).deviation > WARN_ABOVE


@pytest.mark.parametrize("rows", [1, 3, 6, 256])
def test_geometry_is_that_of_plain_loops(monkeypatch, rows):
    monkeypatch.setattr("fedsim.models.etf._ROWS", rows)
    weight = rng(5).normal(size=(7, 11))
    weight[weight < -0.5] = 0
    found = geometry(torch.from_numpy(weight))
    norms = [math.sqrt(sum(x * x for x in row)) for row in weight]
    angles = angles_by_loops(weight)
    mean = sum(angles) / 21  # 7 * 6 / 2 pairs
    expected = {
        "norm_mean": sum(norms) / 7,
        "norm_min": min(norms),
        "norm_max": max(norms),
        "sparsity": sum(x == 0 for row in weight for x in row) / 77,
        "angle_ideal": math.degrees(math.acos(-1 / 6)),
        "angle_mean": mean,
        "angle_min": min(angles),
        "angle_max": max(angles),
        "angle_std": math.sqrt(sum((a - mean) ** 2 for a in angles) / 21),
    }
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-12)
    assert found.sparsity > 0
    ideal = expected["angle_ideal"]
    assert found.deviation == pytest.approx(max(abs(a - ideal) for a in angles))


def test_geometry_of_parallel_and_opposite_rows_is_exact():
    # Rounding takes their cosines beyond 1, where arccos is NaN.
    row = torch.tensor([0.1, 0.7, 0.3])
    found = geometry(torch.nn.Parameter(torch.stack([row, 3 * row, -row])))
    assert found.angle_min == pytest.approx(0, abs=1e-4)
    assert found.angle_max == pytest.approx(180, abs=1e-4)


def test_geometry_reads_as_one_line():
    text = str(geometry(etf(3, 3, rng()) * 2))
    assert text.startswith("norms 2 (2 to 2), 0.00% zeros, angles 120.0000° ")
    assert text.endswith("ideal 120.0000°)")
    assert "\n" not in text


class TestEtfFailure:
    @pytest.mark.parametrize("make", [etf, sparse_etf])
    def test_too_few_features_or_classes(self, make):
        with pytest.raises(ConfigError, match=r"^model: 9 features for 10 classes.* at least as"):
            make(9, 10, rng())
        with pytest.raises(ConfigError, match=r"at least 2 classes, not 1$"):
            make(9, 1, rng())


class TestSparseEtfFailure:
    @pytest.mark.parametrize("sparsity", [1, 1.5, -0.1, math.nan, math.inf])
    def test_sparsity_out_of_range(self, sparsity):
        with pytest.raises(ConfigError, match=rf"^method\.sparsity = {sparsity}: must be"):
            sparse_etf(20, 5, rng(), sparsity=sparsity)

    def test_fewer_entries_than_classes(self):
        # 0.96 * 100 zeros leave 4 entries; 0.95 is the most, one for each class.
        with pytest.raises(ConfigError, match=r"keeps 4 of 100 entries for 5 classes.* is 0\.95$"):
            sparse_etf(20, 5, rng(), sparsity=0.96)
        with pytest.warns(UserWarning, match="no exact sparse ETF"):
            weight = sparse_etf(20, 5, rng(), sparsity=0.95)
        assert (weight != 0).sum(dim=1).tolist() == [1] * 5

    @pytest.mark.parametrize("norm", [0, -0.1, math.nan, math.inf, 1e-30])
    def test_norm_out_of_range(self, norm):
        with pytest.raises(ConfigError, match=rf"^norm = {norm}: must be from 1e-6 to 1e6"):
            sparse_etf(20, 5, rng(), norm=norm)

    def test_unknown_recipe(self):
        with pytest.raises(ConfigError, match=r"^recipe = 'adam': must be 'gram' or"):
            sparse_etf(20, 5, rng(), recipe="adam")


class TestGeometryFailure:
    @pytest.mark.parametrize("shape", [(3,), (1, 4), (2, 3, 4), ()])
    def test_not_the_weights_of_two_classes(self, shape):
        with pytest.raises(DataError, match=r"^weight of shape \[.*\]: give \[classes, features\]"):
            geometry(torch.ones(shape))

    @pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
    def test_a_row_without_direction(self, value):
        weight = torch.eye(3)
        weight[1] = value
        with pytest.raises(DataError, match=rf"^row 1 of weight has the norm {value:g}"):
            geometry(weight)
