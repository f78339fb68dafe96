"""Parquet files, through the optional library ``pyarrow``.

Shapes: N training examples, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedsim.checks import check
from fedsim.data.files import find_file, find_folder
from fedsim.data.images import check_size
from fedsim.data.source import ExampleArray, Source, display_names
from fedsim.errors import DataError


def parquet(
    location: str,
    *,
    flip: bool = False,
    normalise: bool = True,
    size: int = 0,
    grey: bool = False,
    x: str | None = None,
    label: str | None = None,
    client: str | None = None,
) -> Source:
    """Return the images, vectors or table of Parquet files.

    Parameters
    ----------
    location : str
        A folder with the files ``train*.parquet`` and ``test*.parquet``, of which those of a split
        are read in sorted order and files of other names are left out; or one file with a column
        ``split``, which says train or test.
    flip : bool
        Whether a flip left to right keeps an image's meaning.
    normalise : bool
        See `Source`.
    size, grey
        As in the source ``folder``; of images only.
    x : str, optional
        The column of the examples: encoded images, as bytes or as the hub's structs with a field
        ``bytes``, in the formats of the source ``folder``; or lists of D numbers. If not given:
        ``image``, else ``img``, else the only column of lists of numbers; where there is none of
        these, all columns of numbers that are left, in the first file's order, are the features.
        Then text and dates are left out, and pandas's index (``__index_level_0__``).
    label : str, optional
        The column of the labels: whole numbers from 0, or text, whose sorted values in both splits
        are the classes. In the training rows null or -1 where nobody knows the label. If not
        given: ``fine_label``, else ``label``.
    client : str, optional
        The column that says whose an example is, text or whole numbers; clients are numbered in
        sorted order. If not given: ``client``, if there is one. Test files may have none.

    Returns
    -------
    Source
        Images uint8 [N, 1, H, W] if all are grey, else [N, 3, H, W]; or vectors float32 [N, D].
        With `group_train`, and `group_test`, if there is a column of clients. C is the number of
        texts, or the largest label of both splits + 1. Texts, and the numbers of clients where they
        aren't 0, 1, ..., are the names of classes and clients.

    Raises
    ------
    DataError
        If ``pyarrow`` isn't installed, a file or column is missing, damaged or of another kind, or
        a value is null, not finite in float32 or out of range. Rows are counted from 0.

    Warns
    -----
    UserWarning
        Once if columns of text or dates are left out of the features.
    """
    check_size(size)
    for key, column in (("x", x), ("label", label), ("client", client)):
        check(column != "", f"data.{key}", column, "the name of a column, or not given")
    name = f"parquet:{location}"
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"{name}: needs the package pyarrow, {error}; install it: pip install"
            ' "fedsim-flwr[parquet]"'
        ) from error
    from fedsim.data import parquet_columns, parquet_files

    path = Path(location)
    if (file := find_file(name, path)) is not None:
        files = parquet_files.open_file(name, file)
    elif (folder := find_folder(name, path)) is not None:
        files = parquet_files.open_folder(name, folder)
    else:
        raise DataError(f"{name}: no file or folder {location}")
    chosen = parquet_files.choose(files, x=x, label=label, client=client)
    splits = parquet_files.read(files, chosen)
    examples: Mapping[str, ExampleArray]
    if chosen.kind == "image":
        examples = parquet_columns.images(splits, chosen.x[0], size=size, grey=grey)
    elif size or grey:
        given = f"data.size = {size}" if size else "data.grey = true"
        raise DataError(f"{given}: is for images, but the examples of {name} are numbers")
    elif chosen.kind == "vector":
        examples = parquet_columns.vectors(splits, chosen.x[0])
    else:
        examples = parquet_columns.features(splits, chosen.x)
    y, classes = parquet_columns.labels(splits, chosen.label)
    groups, clients = (
        ({}, ()) if chosen.client is None else parquet_columns.clients(splits, chosen.client)
    )
    return Source(
        name=name,
        x_train=examples["train"],
        y_train=y["train"],
        x_test=examples["test"],
        y_test=y["test"],
        num_classes=len(classes),
        flip=flip,
        normalise=normalise,
        group_train=groups.get("train"),
        group_test=groups.get("test"),
        class_names=display_names(classes),
        client_names=display_names(clients),
    )
