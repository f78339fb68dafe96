"""The augmentations against loops over images and against kornia's own RandAugment."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data.augment import OPERATIONS, StrongAugmentation, WeakAugmentation

CENTRED = 2  # the crop of 16 x 16 images that shifts by nothing, with flips


def test_weak_augmentation_equals_a_loop_over_images():
    weak = WeakAugmentation(side=16, flip=True)
    assert weak.padding == 2
    rng = np.random.default_rng(0)
    x = rng.random((6, 3, 16, 16)).astype(np.float32)
    draws = weak.draw(rng, 6)
    padded = np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2)))
    expected = []
    for image, (down, right, flip) in zip(padded, draws, strict=True):
        crop = image[:, down : down + 16, right : right + 16]
        expected.append(crop[:, :, ::-1] if flip else crop)
    np.testing.assert_array_equal(weak(torch.from_numpy(x), draws).numpy(), np.stack(expected))


def test_draws_reach_every_shift_and_flip_only_where_allowed():
    rng = np.random.default_rng(0)
    draws = WeakAugmentation(side=8, flip=False).draw(rng, 200)
    assert set(draws[:, 0]) == set(draws[:, 1]) == {0, 1, 2}
    assert set(draws[:, 2]) == {0}
    assert set(WeakAugmentation(side=8, flip=True).draw(rng, 200)[:, 2]) == {0, 1}


def images(*shape, low=0, high=255):
    rng = np.random.default_rng(5)
    return torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0, 255), (0, 16), (-1.5, 2.25), (10, 30), (4, 4)])
def test_strong_images_keep_shape_type_and_range(channels, flip, low, high):
    x = images(40, channels, 8, 12, low=low, high=high)
    strong = StrongAugmentation(side=8, flip=flip, low=low, high=high)
    y = strong(x, strong.draw(np.random.default_rng(0), 40))
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert bool(((y >= low) & (y <= high)).all())


@pytest.mark.parametrize("flip", [False, True])
def test_the_draws_alone_decide(flip):
    strong = StrongAugmentation(side=16, flip=flip, low=0, high=255)
    x = images(64, 3, 16, 16)
    before = x.clone()
    draws = strong.draw(np.random.default_rng(0), 64)
    np.testing.assert_array_equal(draws, strong.draw(np.random.default_rng(0), 64))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    y = strong(x, draws)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(strong(x, draws), y)
    assert torch.equal(x, before)
    assert not torch.allclose(y, x)


@given(flip=st.booleans(), channels=st.sampled_from([1, 3]), seed=st.integers(0, 2**32 - 1))
def test_an_image_does_not_depend_on_the_others_of_its_batch(flip, channels, seed):
    strong = StrongAugmentation(side=8, flip=flip, low=0, high=255)
    x = images(6, channels, 8, 8)
    draws = strong.draw(np.random.default_rng(seed), 6)
    alone = [strong(x[i : i + 1], draws[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(strong(x, draws), torch.cat(alone), rtol=0, atol=1e-3)


class TestRandAugment:
    """Sources with flips."""

    def draws(self, operation, signs, thresholds):
        rows = [
            (CENTRED, CENTRED, 0, OPERATIONS.index(operation), sign, threshold, 0)
            for sign, threshold in zip(signs, thresholds, strict=True)
        ]
        return np.array(rows, np.float64)

    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_each_operation_is_that_of_kornia(self, operation):
        from kornia.augmentation.auto import RandAugment
        from kornia.augmentation.auto.rand_augment.rand_augment import default_policy

        policy = [entry for entry in default_policy if entry[0][0] == operation]
        theirs = RandAugment(n=1, m=10, policy=policy)
        x = images(12, 3, 16, 20)
        torch.manual_seed(0)
        chosen = theirs.forward_parameters(x.shape)
        drawn = chosen[0].data[0].data
        expected = 255 * theirs(x / 255, params=chosen)

        signs = thresholds = np.ones(12)
        amount = {"rotate": "degrees"}.get(operation, operation)
        if operation in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
            signs = np.sign(drawn[amount].numpy())
            assert set(signs) == {-1.0, 1.0}
        if operation == "solarize_add":
            thresholds = drawn["thresholds"].numpy()
        strong = StrongAugmentation(side=16, flip=True, low=0, high=255)
        found = strong(x, self.draws(operation, signs, thresholds))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01)

    def test_the_operations_are_those_of_kornia(self):
        from kornia.augmentation.auto.rand_augment.rand_augment import default_policy

        assert [entry[0][0] for entry in default_policy] == list(OPERATIONS)

    def test_each_image_draws_its_own_operation(self):
        strong = StrongAugmentation(side=16, flip=True, low=0, high=255)
        draws = strong.draw(np.random.default_rng(0), 3000)
        counts = np.bincount(draws[:, 3].astype(int), minlength=15)
        # 200 expected of each, with a standard deviation of 13.7.
        assert counts.min() > 140
        assert counts.max() < 260
        assert set(draws[:, 4]) == {-1.0, 1.0}
        assert set(draws[:, 0]) == {0, 1, 2, 3, 4}
        assert set(draws[:, 2]) == {0, 1}

    def test_values_count_from_low(self):
        x = images(4, 1, 16, 16, low=-1, high=3)
        strong = StrongAugmentation(side=16, flip=True, low=-1, high=3)
        inverted = strong(x, self.draws("invert", [1] * 4, [0] * 4))
        torch.testing.assert_close(inverted, 2 - x)

    def test_grey_images_have_no_colour_to_change(self):
        x = images(4, 1, 16, 16)
        strong = StrongAugmentation(side=16, flip=True, low=0, high=255)
        torch.testing.assert_close(strong(x, self.draws("color", [1] * 4, [0] * 4)), x)

    @pytest.mark.parametrize("operation", OPERATIONS)
    @pytest.mark.parametrize("sides", [(1, 1), (2, 2), (1, 5), (5, 2)])
    def test_images_of_few_pixels(self, operation, sides):
        x = images(4, 3, *sides)
        strong = StrongAugmentation(side=min(sides), flip=True, low=0, high=255)
        draws = self.draws(operation, [1] * 4, [0.5] * 4)
        draws[:, :3] = (1, 1, 0)  # a crop that shifts by nothing
        y = strong(x, draws)
        assert y.shape == x.shape
        assert bool(((y >= 0) & (y <= 255)).all())
        if operation == "sharpness":
            torch.testing.assert_close(y, x)

    def test_the_weak_augmentation_follows(self):
        x = images(1, 1, 16, 16)
        strong = StrongAugmentation(side=16, flip=True, low=0, high=255)
        draws = self.draws("invert", [1], [0])
        draws[:, :3] = (4, 2, 1)  # up by two, and flipped
        expected = np.zeros((16, 16))
        expected[:14] = 255 - x[0, 0, 2:].numpy()[:, ::-1]
        np.testing.assert_allclose(strong(x, draws)[0, 0].numpy(), expected, atol=1e-3)


class TestWithoutFlips:
    """Sources such as digits."""

    def strong(self, side=16, low=0.0):
        return StrongAugmentation(side=side, flip=False, low=low, high=255)

    def test_draws(self):
        draws = self.strong(side=8).draw(np.random.default_rng(0), 900)
        shifts = draws[:, :2].astype(int)
        # Twice 0, 1 or 2 with equal chances, that is 1, 2, 3, 2, 1 of 9 for each sum.
        for axis in (0, 1):
            counts = np.bincount(shifts[:, axis], minlength=5)
            np.testing.assert_allclose(counts, [100, 200, 300, 200, 100], atol=60)
        assert set(draws[:, 2]) == {0}
        assert -15 <= draws[:, 3].min() < -14
        assert 14 < draws[:, 3].max() <= 15
        assert set(draws[:, 4]) == {0, 1, 2}
        assert 0 <= draws[:, 5:].min() < 0.05
        assert 0.95 < draws[:, 5:].max() < 1

    def test_shift_and_square(self):
        x = images(1, 2, 16, 16, low=3)
        # Shifts of 16-pixel images are 0..8, 4 is none: 1 left, 3 down. The square of side 4 starts
        # at floor(0.5 * 13) = 6 down and floor(0.99 * 13) = 12 to the right.
        draws = np.array([[1, 5, 0, 0, 4, 0.5, 0.99]])
        expected = np.full((2, 16, 16), 3.0)
        expected[:, 3:, :15] = x[0, :, :13, 1:]
        expected[:, 6:10, 12:] = 3
        found = self.strong(low=3)(x, draws)[0]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)

    def test_rotation_turns_about_the_centre(self):
        # A bright spot 6 pixels right of the centre of 17 x 17 pixels.
        x = torch.zeros(2, 1, 17, 17)
        x[:, :, 8, 14] = 255
        shift = StrongAugmentation(side=17, flip=False, low=0, high=255)
        draws = np.array([[4, 4, 0, 15, 0, 0, 0], [4, 4, 0, -15, 0, 0, 0]])
        y = shift(x, draws)[:, 0].numpy()
        place = np.arange(17) - 8
        total = y.sum(axis=(1, 2))
        down = (y.sum(axis=2) * place).sum(axis=1) / total
        right = (y.sum(axis=1) * place).sum(axis=1) / total
        # 6 cos 15 = 5.80, 6 sin 15 = 1.55; interpolation moves the centre of mass a little.
        np.testing.assert_allclose(right, [5.80, 5.80], atol=0.15)
        np.testing.assert_allclose(down, [-1.55, 1.55], atol=0.15)


def test_kornia_is_imported_only_for_rand_augment():
    code = (
        "import sys, numpy as np, torch\n"
        "for name in ('flwr', 'ray', 'pandas', 'pydantic', 'sklearn', 'scipy', 'kornia'):\n"
        "    sys.modules[name] = None\n"
        "from fedsim.data.augment import StrongAugmentation\n"
        "strong = StrongAugmentation(8, False, 0, 16)\n"
        "strong(torch.ones(3, 1, 8, 8), strong.draw(np.random.default_rng(0), 3))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
