"""A data set before it is dealt out: a training set and a global test set.

Shapes: N training examples, M test examples, C classes, D features, [channels, H, W] an image.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import is_whole
from fedsim.errors import DataError

ExampleArray = NDArray[np.uint8] | NDArray[np.float32]
"""Images [N, channels, H, W] of either type, or vectors float32 [N, D]."""

UNKNOWN = -1
"""In the place of the label of a training example that nobody knows."""

MAX_CLASSES = 1_000_000
"""Labels above this are taken for a mistake (a hash, an id) before memory is asked for them."""

# Unicode's categories of what would break a line or can't be written to a file: control characters,
# surrogates (of file names that are no UTF-8), separators of lines and paragraphs.
_UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")

# Values worked on at once, so that a pass over the data never copies it as a whole.
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Source:
    """Examples and labels of a training set and of a global test set.

    Attributes
    ----------
    name : str
        What messages call it, as in the experiment file's ``data.source``.
    x_train : uint8 or float32 [N, channels, H, W], or float32 [N, D]
        Images or vectors in raw units (see `normalisation`); finite.
    y_train : int64 [N]
        Labels, 0 <= y < C, or `UNKNOWN`, but not all. Other integer types are converted.
    x_test : the same type as `x_train` [M, ...]
        The global test set.
    y_test : int64 [M]
        Its labels, all known.
    num_classes : int
        C, 2..`MAX_CLASSES`.
    flip : bool
        Whether a horizontal flip keeps an image's meaning.
    normalise : bool
        Whether models get the inputs less their mean and over their deviation, or as they are: the
        numbers of tokens, say, which a model takes by ``x.long()``.
    group_train : int64 [N], optional
        Natural group of each training example, for instance its writer.
    group_test : int64 [M], optional
        The same for the test set; only together with `group_train`.
    class_names : tuple of str
        The name of each class, C distinct ones, or empty: the classes are called by their numbers.
    client_names : tuple of str
        The same of the G natural groups, which are then numbered 0..G-1 over both splits.

    Raises
    ------
    DataError
        If any of the above doesn't hold; the line names the source, the array and, for a bad
        label or value, the first index.

    Examples
    --------
    >>> x = np.array([[1.0], [3.0]], np.float32)
    >>> toy = Source(name="toy", x_train=x, y_train=np.array([0, 1]),
    ...              x_test=x, y_test=np.array([0, 1]), num_classes=2)
    >>> mean, std = toy.normalisation()
    >>> float(mean[0]), float(std[0])
    (2.0, 1.0)
    """

    name: str
    x_train: ExampleArray
    y_train: NDArray[np.int64]
    x_test: ExampleArray
    y_test: NDArray[np.int64]
    num_classes: int
    flip: bool = False
    normalise: bool = True
    group_train: NDArray[np.int64] | None = None
    group_test: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] = ()
    client_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise DataError(f"a source's name is {self.name!r}; must be a text")
        if not is_whole(self.num_classes) or not 2 <= self.num_classes <= MAX_CLASSES:
            raise DataError(
                f"{self.name}: num_classes = {self.num_classes!r}; must be a whole number,"
                f" 2..{MAX_CLASSES}, and labels 0..num_classes-1"
            )
        for split in ("train", "test"):
            x: NDArray[Any] = getattr(self, f"x_{split}")
            self._check_examples(f"x_{split}", x)
            labels = self._check_integers(f"y_{split}", getattr(self, f"y_{split}"), len(x))
            self._check_range(f"y_{split}", labels, may_be_unknown=split == "train")
            object.__setattr__(self, f"y_{split}", labels)
            group = getattr(self, f"group_{split}")
            if group is not None:
                group = self._check_integers(f"group_{split}", group, len(x))
                object.__setattr__(self, f"group_{split}", group)
        if self.x_train.dtype != self.x_test.dtype:
            raise DataError(
                f"{self.name}: x_train is {self.x_train.dtype} but x_test is {self.x_test.dtype}"
            )
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise DataError(
                f"{self.name}: an example of x_train has shape {self.x_train.shape[1:]}"
                f" but one of x_test {self.x_test.shape[1:]}"
            )
        if self.group_test is not None and self.group_train is None:
            raise DataError(f"{self.name}: has group_test but no group_train")
        self._check_names("class_names", self.num_classes, "classes")
        if self.client_names:
            splits = [group for group in (self.group_train, self.group_test) if group is not None]
            groups = np.unique(np.concatenate([*splits, np.empty(0, np.int64)]))
            self._check_names("client_names", len(groups), "natural groups")
            if groups[0] != 0 or groups[-1] != len(groups) - 1:
                raise DataError(
                    f"{self.name}: the groups are numbered {groups[0]}..{groups[-1]}; with"
                    f" client_names they must be 0..{len(groups) - 1}, none left out"
                )

    def _check_names(self, what: str, count: int, of: str) -> None:
        names: Any = getattr(self, what)
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{self.name}: {what} is {names!r}; must be a tuple of texts")
        if names and len(names) != count:
            raise DataError(
                f"{self.name}: {what} has {len(names)} names, but there are {count} {of}; must be"
                " a name for each, or empty"
            )
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise DataError(f"{self.name}: {what} has {twice!r} twice; names must be distinct")

    def _check_array(self, what: str, array: object) -> None:
        if not isinstance(array, np.ndarray):
            kind = type(array).__name__
            raise DataError(f"{self.name}: {what} is of type {kind}; must be a NumPy array")

    def _check_examples(self, what: str, x: NDArray[Any]) -> None:
        self._check_array(what, x)
        image = x.ndim == 4 and x.dtype in (np.uint8, np.float32)
        vector = x.ndim == 2 and x.dtype == np.float32
        if not (image or vector):
            raise DataError(
                f"{self.name}: {what} is {x.dtype} {list(x.shape)}; must be images, uint8 or"
                " float32 [N, channels, H, W], or vectors, float32 [N, D]"
            )
        if x.size == 0:
            raise DataError(f"{self.name}: {what} is empty, its shape is {list(x.shape)}")
        if x.dtype == np.float32:
            for start, part in _chunks(x):
                good = np.isfinite(part).reshape(len(part), -1).all(axis=1)
                if not good.all():
                    index = start + int(good.argmin())
                    raise DataError(
                        f"{self.name}: {what}[{index}] has a value that is NaN or infinite in"
                        " float32"
                    )

    def _check_integers(self, what: str, values: NDArray[Any], length: int) -> NDArray[np.int64]:
        self._check_array(what, values)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise DataError(
                f"{self.name}: {what} is {values.dtype} {list(values.shape)}; must be integers [N]"
            )
        if len(values) != length:
            split = what.rsplit("_", 1)[1]
            raise DataError(
                f"{self.name}: x_{split} has {length} examples but {what} has {len(values)} entries"
            )
        if values.dtype == np.uint64 and (values > np.iinfo(np.int64).max).any():
            index = int(values.argmax())
            raise DataError(f"{self.name}: {what}[{index}] = {values[index]}: too large an integer")
        return values.astype(np.int64, copy=False)

    def _check_range(self, what: str, labels: NDArray[np.int64], may_be_unknown: bool) -> None:
        least = UNKNOWN if may_be_unknown else 0
        bad = (labels < least) | (labels >= self.num_classes)
        if bad.any():
            index = int(bad.argmax())
            unless = f", or {UNKNOWN} where nobody knows it" if may_be_unknown else ""
            raise DataError(
                f"{self.name}: {what}[{index}] = {labels[index]}; labels must be"
                f" 0..{self.num_classes - 1}{unless}"
            )
        if (labels == UNKNOWN).all():
            raise DataError(f"{self.name}: {what} has no label: all are {UNKNOWN}")

    def normalisation(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the mean and standard deviation of `x_train`, in raw units: 0 and 1 if not wanted.

        Returns
        -------
        mean, std : float32 [channels] of images, [D] of vectors
            Population standard deviation; 1 where a channel or feature is constant.
        """
        x = self.x_train
        if not self.normalise:
            return np.zeros(x.shape[1], np.float32), np.ones(x.shape[1], np.float32)
        axes = (0,) if x.ndim == 2 else (0, 2, 3)
        # Sums of differences from the first example: one pass, no cancellation for data far from
        # 0, and exactly 0 for a constant.
        origin = (x[0] if x.ndim == 2 else x[0, :, :1, :1]).astype(np.float64)
        total = squares = np.zeros(x.shape[1], np.float64)
        for _, part in _chunks(x):
            difference = part - origin
            total = total + difference.sum(axis=axes)
            squares = squares + np.square(difference, out=difference).sum(axis=axes)
        count = x.size // x.shape[1]
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0.0)).astype(np.float32)
        return (mean + origin.ravel()).astype(np.float32), np.where(std > 0, std, np.float32(1))


def warn_of_large_integers(what: str, x: NDArray[Any]) -> None:
    """Warn of integers that float32 rounds, such as times in nanoseconds."""
    if x.dtype.kind in "iu" and x.dtype.itemsize > 2 and x.size:
        largest = max(abs(int(x.max())), abs(int(x.min())))
        if largest > 2**24:
            warnings.warn(
                f"{what} has integers up to {largest}; inputs are float32, which rounds those "
                "above 2**24 = 16777216: subtract what they have in common, or leave them out",
                stacklevel=2,
            )


def display_names(values: Iterable[Any]) -> tuple[str, ...]:
    r"""Return what people call things that are numbered 0, 1, ..., in one line each.

    Parameters
    ----------
    values : iterable [n]
        What the data call them, in the order of their numbers.

    Returns
    -------
    tuple of str [n]
        Their texts, or empty where that is no more than each one's number. Line breaks and their
        like are written as in Python.

    Examples
    --------
    >>> display_names([101, 205]), display_names(["cat", "two\nlines"]), display_names(["0", "1"])
    (('101', '205'), ('cat', 'two\\nlines'), ())
    """
    names = tuple(_one_line(str(value)) for value in values)
    return () if names == tuple(map(str, range(len(names)))) else names


def _one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNWRITABLE else c
        for c in text
    )


def _chunks(x: NDArray[Any]) -> list[tuple[int, NDArray[Any]]]:
    """Cut `x` along its first axis into views of about `_CHUNK` values, with their starts."""
    step = max(1, _CHUNK * len(x) // x.size)
    return [(start, x[start : start + step]) for start in range(0, len(x), step)]
