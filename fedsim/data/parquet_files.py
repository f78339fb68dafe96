"""Finds the Parquet files and columns of a data set; needs the library ``pyarrow``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedsim.data.files import (
    SPLITS,
    USUAL_IMAGE_COLUMNS,
    USUAL_LABEL_COLUMNS,
    check_file,
    first_line,
)
from fedsim.data.parquet_columns import Kind, Part, check_nulls, kind
from fedsim.errors import DataError

_CLIENT = "client"
_SPLIT = "split"
_INDEX = "__index_level_"  # how the names of the columns of pandas's index begin


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A file and what its columns are.

    Attributes
    ----------
    name : str
        The source.
    place : str
        How messages call the file, with a colon; empty if it is the only one.
    path : Path
        Where it is.
    split : str
        Its split, or "" if it has a column that says so.
    types : dict of str to pyarrow.DataType
        Its columns.
    """

    name: str
    place: str
    path: Path
    split: str
    types: dict[str, Any]

    def kind(self, column: str) -> Kind:
        """Return what a column can serve as."""
        return kind(self.types[column])

    def check_has(self, column: str) -> None:
        """Raise DataError if the file has no such column."""
        if column not in self.types:
            have = ", ".join([*self.types][:20]) or "none"
            have += ", ..." if len(self.types) > 20 else ""
            raise DataError(
                f"{self.name}: {self.place}has no column {column!r}; its columns are {have}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """The columns to read.

    Attributes
    ----------
    kind : {"image", "vector", "number"}
        What the examples are; ``number`` is a table.
    x : tuple of str
        Their columns, one unless they are a table.
    label : str
        That of the labels.
    client : str, optional
        That of the clients, if there is one.
    """

    kind: Kind
    x: tuple[str, ...]
    label: str
    client: str | None


def open_file(name: str, path: Path) -> list[File]:
    """Return a file that has both splits."""
    file = _open(name, "", path, "")
    file.check_has(_SPLIT)
    if file.kind(_SPLIT) != "text":
        raise DataError(f"{name}: column 'split' is {file.types[_SPLIT]}; must be train or test")
    return [file]


def open_folder(name: str, folder: Path) -> list[File]:
    """Return the files of a folder, by split and name; each has a split of its own."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".parquet")
    except OSError as error:
        raise DataError(f"{name}: can't read the folder: {first_line(error)}") from error
    files = []
    for split in SPLITS:
        mine = [path for path in paths if path.name.startswith(split)]
        if not mine:
            have = ", ".join(path.name for path in paths) or "no .parquet files"
            raise DataError(f"{name}: no file {split}*.parquet in the folder itself; it has {have}")
        files += [_open(name, f"{path.name}: ", path, split) for path in mine]
    return files


def _open(name: str, place: str, path: Path, split: str) -> File:
    try:
        check_file(f"{name}: {path.name}", path)
        schema = pq.read_schema(path)
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{name}: {place}can't be read: {first_line(error)}") from error
    types = dict(zip(schema.names, schema.types, strict=True))
    if len(types) < len(schema.names):
        twice = next(column for column in types if schema.names.count(column) > 1)
        raise DataError(f"{name}: {place}has several columns {twice!r}")
    return File(name=name, place=place, path=path, split=split, types=types)


def choose(
    files: Sequence[File], *, x: str | None, label: str | None, client: str | None
) -> Columns:
    """Return the columns to read, which all files must have.

    Parameters
    ----------
    files : sequence of File
        The files of both splits, at least one.
    x, label, client : str, optional
        As in `fedsim.data.parquet.parquet`.

    Raises
    ------
    DataError
        If a column is missing in a file, or can't be what it is taken for.

    Warns
    -----
    UserWarning
        If columns are left out of the features of a table.
    """
    first = files[0]
    usual = (column for column in USUAL_LABEL_COLUMNS if column in first.types)
    label = label or next(usual, "label")
    has_clients = bool(client) or any(_CLIENT in file.types for file in files)
    client = client or _CLIENT
    test_clients = any(client in file.types for file in files if file.split == "test")
    for file in files:
        file.check_has(label)
        if has_clients and (file.split != "test" or test_clients):
            file.check_has(client)
    taken = {label, client} if first.split else {label, client, _SPLIT}
    found = _examples(first, x, taken)
    for file in files:
        for column in found[1]:
            file.check_has(column)
        other = _examples(file, x, taken)
        if (other[0], set(other[1])) != (found[0], set(found[1])):
            raise DataError(
                f"{file.name}: {file.place}the examples are {_described(file, other[1])}, but"
                f" {first.place}{_described(first, found[1])}"
            )
    if found[0] == "number":
        _warn_of_others(first, {*found[1], *taken})
    return Columns(kind=found[0], x=found[1], label=label, client=client if has_clients else None)


def _examples(file: File, x: str | None, taken: set[str]) -> tuple[Kind, tuple[str, ...]]:
    """Return what the examples are, ``number`` for a table, and their columns."""
    rest = [name for name in file.types if name not in taken and not name.startswith(_INDEX)]
    named = [x] if x else [column for column in USUAL_IMAGE_COLUMNS if column in rest]
    lists = [column for column in rest if file.kind(column) == "vector"]
    if not named and len(lists) > 1:
        raise DataError(
            f"{file.name}: {file.place}has several columns of lists, {', '.join(lists)}; set"
            " data.x to that of the examples"
        )
    if named or lists:
        column = (named or lists)[0]
        file.check_has(column)
        if file.kind(column) not in ("image", "vector"):
            raise DataError(
                f"{file.name}: {file.place}column {column!r} is {file.types[column]}; examples must"
                " be encoded images (bytes, or a struct with a field bytes) or lists of numbers"
            )
        return file.kind(column), (column,)
    for column in rest:
        if file.kind(column) in ("image", "nested"):
            raise DataError(
                f"{file.name}: {file.place}column {column!r} is {file.types[column]}, which is no"
                " feature of a table; set data.x to the column of the examples, or leave it out of"
                " the file"
            )
    numbers = tuple(column for column in rest if file.kind(column) in ("whole", "number"))
    if not numbers:
        raise DataError(
            f"{file.name}: {file.place}has no column of examples; its columns are"
            f" {_described(file, list(file.types))}"
        )
    return "number", numbers


def _warn_of_others(file: File, used: set[str]) -> None:
    others = [name for name in file.types if name not in used and not name.startswith(_INDEX)]
    if others:
        more = f", and {len(others) - 20} more" if len(others) > 20 else ""
        warnings.warn(
            f"{file.name}: {file.place}not among the features, for they are no numbers:"
            f" {_described(file, others[:20])}{more}",
            UserWarning,
            stacklevel=4,
        )


def _described(file: File, columns: Sequence[str]) -> str:
    return ", ".join(f"{column} ({file.types[column]})" for column in columns)


def read(files: Sequence[File], columns: Columns) -> dict[str, list[Part]]:
    """Return the chosen columns of each split, in the order of the files and their rows.

    Raises
    ------
    DataError
        If a file is damaged, a split has no rows, or a row is of another split.
    """
    splits: dict[str, list[Part]] = {split: [] for split in SPLITS}
    wanted = {*columns.x, columns.label}
    if columns.client is not None:
        wanted.add(columns.client)
    for file in files:
        table = _read(file, wanted if file.split else wanted | {_SPLIT})
        whole = Part(name=file.name, place=file.place, table=table, rows=np.arange(table.num_rows))
        if file.split:
            splits[file.split].append(whole)
        else:
            for split, part in _by_split(whole).items():
                splits[split].append(part)
    for split, parts in splits.items():
        if not any(len(part.rows) for part in parts):
            raise DataError(f"{files[0].name}: the split {split} has no rows")
    return splits


def _read(file: File, columns: set[str]) -> Any:
    wanted = [column for column in file.types if column in columns]
    try:
        with pq.ParquetFile(file.path, page_checksum_verification=True) as opened:
            table = opened.read(columns=wanted)
        table.validate(full=True)
        for place, field in enumerate(table.schema):
            # Few of the library's functions work on views.
            for is_view, plain in (
                (pa.types.is_string_view, pa.string()),
                (pa.types.is_binary_view, pa.binary()),
            ):
                if is_view(field.type):
                    table = table.set_column(place, field.name, table[place].cast(plain))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file.name}: {file.place}can't be read: {first_line(error)}") from error
    return table


def _by_split(whole: Part) -> dict[str, Part]:
    """Take a table apart by its column of splits."""
    values = whole.table.column(_SPLIT)
    check_nulls(whole, _SPLIT, values)
    of_row = np.array(values.to_pylist(), object)
    masks = {split: of_row == split for split in SPLITS}
    known = np.logical_or.reduce(list(masks.values()))
    if not known.all():
        row = int(known.argmin())
        raise whole.error(_SPLIT, row, f"is {of_row[row]!r}; must be train or test")
    return {
        split: Part(
            name=whole.name,
            place=whole.place,
            table=whole.table.filter(pa.array(mask)),
            rows=whole.rows[mask],
        )
        for split, mask in masks.items()
    }
