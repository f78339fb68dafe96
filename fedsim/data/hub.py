"""Data sets of the Hugging Face hub, through the optional library ``datasets``.

Shapes: N training examples, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.data.files import SPLITS, USUAL_IMAGE_COLUMNS, USUAL_LABEL_COLUMNS, first_line
from fedsim.data.images import pixels, stack
from fedsim.data.source import UNKNOWN, Source, display_names
from fedsim.errors import DataError


def hf(location: str, *, flip: bool = False) -> Source:
    """Return the images of a data set of the Hugging Face hub; the first use downloads it.

    Parameters
    ----------
    location : str
        The name on the hub, for instance ``uoft-cs/cifar10``, or a local folder in a form that
        ``datasets.load_dataset`` reads. It must have the splits train and test, a column of images
        of one size and a column of class labels; of several label columns ``fine_label``, then
        ``label`` is taken, of several image columns ``image``, then ``img``. Labels of training
        images may be missing.
    flip : bool
        Whether a flip left to right keeps an image's meaning.

    Returns
    -------
    Source
        Images uint8 [N, 1, H, W] if all are grey, else [N, 3, H, W]; the classes have their names.

    Raises
    ------
    DataError
        If ``datasets`` isn't installed, the data can't be had, or don't have the form above.
    """
    name = f"hf:{location}"
    try:
        from datasets import ClassLabel, Image, load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise DataError(
            f"{name}: needs the package datasets, {error}; install it: pip install"
            ' "fedsim-flwr[hub]"'
        ) from error
    try:
        splits = load_dataset(location)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(f"{name}: can't load it: {first_line(error)}") from error
    missing = [split for split in SPLITS if split not in splits]
    if missing:
        raise DataError(
            f"{name}: has no split {' and no split '.join(missing)}; it has"
            f" {', '.join(sorted(splits))}"
        )
    features = splits["train"].features
    image = _column(name, features, Image, "images", USUAL_IMAGE_COLUMNS)
    label = _column(name, features, ClassLabel, "class labels", USUAL_LABEL_COLUMNS)
    for column in (image, label):
        if column not in splits["test"].features:
            raise DataError(f"{name}: the split train has a column {column!r}, but test has none")
    images = {split: _read(f"{name}: {split}", splits[split], image) for split in SPLITS}
    x = stack(name, images, lambda split, index: f"{split}: image {index}")
    labels = {
        split: np.array([UNKNOWN if y is None else y for y in splits[split][label]])
        for split in SPLITS
    }
    return Source(
        name=name,
        x_train=x["train"],
        y_train=labels["train"],
        x_test=x["test"],
        y_test=labels["test"],
        num_classes=features[label].num_classes,
        flip=flip,
        class_names=display_names(features[label].names),
    )


def _column(
    name: str, features: dict[str, Any], kind: type, what: str, usual: tuple[str, ...]
) -> str:
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    for column in usual:
        if column in found:
            return column
    if found:
        raise DataError(
            f"{name}: has several columns of {what}, {', '.join(found)}, and none of them is named"
            f" {' or '.join(usual)}"
        )
    kinds = ", ".join(f"{column} ({type(f).__name__})" for column, f in features.items())
    raise DataError(f"{name}: has no column of {what}; its columns are {kinds}")


def _decoded(what: str, split: Any, column: str) -> Iterator[Any]:
    """Yield the images; the library decodes each as it is asked for."""
    index = 0
    try:
        for row in split.select_columns(column):
            yield row[column]
            index += 1
    except Exception as error:  # Pillow lets all kinds through
        raise DataError(f"{what}: image {index} can't be decoded: {first_line(error)}") from error


def _read(what: str, split: Any, column: str) -> list[NDArray[np.uint8]]:
    """Return the images [H, W] or [H, W, 3]."""
    return [
        pixels(f"{what}: image {index}", image)
        for index, image in enumerate(_decoded(what, split, column))
    ]
