"""Columns of Parquet files as arrays, each value checked; needs the library ``pyarrow``.

Shapes: N rows of a split, D numbers of a row, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fedsim.data.files import numbered
from fedsim.data.images import decode, stack
from fedsim.data.source import MAX_CLASSES, UNKNOWN, warn_of_large_integers
from fedsim.errors import DataError

Kind = Literal["text", "whole", "number", "image", "vector", "nested", "other"]
"""What a column's type can serve as: ``number`` is any but a whole one, ``nested`` is no use."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Part:
    """Rows of one file that belong to one split.

    Attributes
    ----------
    name : str
        The source.
    place : str
        How messages call the file, with a colon; empty if it is the only one.
    table : pyarrow.Table
        The rows.
    rows : int64 [N]
        Their numbers in the file.
    """

    name: str
    place: str
    table: Any
    rows: NDArray[np.int64]

    def at(self, column: str, row: int) -> str:
        """Return what messages call a value."""
        return f"{self.place}column {column!r}, row {self.rows[row]}"

    def error(self, column: str, row: int, problem: str) -> DataError:
        """Return an error about a value."""
        return DataError(f"{self.name}: {self.at(column, row)} {problem}")


Splits = Mapping[str, Sequence[Part]]


def kind(column_type: Any) -> Kind:
    """Return what a column's type can serve as."""
    types = pa.types
    if types.is_dictionary(column_type):
        return kind(column_type.value_type)
    if (
        types.is_string(column_type)
        or types.is_large_string(column_type)
        or types.is_string_view(column_type)
    ):
        return "text"
    if types.is_integer(column_type):
        return "whole"
    if _is_number(column_type):
        return "number"
    if _is_binary(column_type):
        return "image"
    if types.is_struct(column_type):
        field = column_type.get_field_index("bytes")
        return "image" if field >= 0 and _is_binary(column_type[field].type) else "nested"
    if (
        types.is_list(column_type)
        or types.is_large_list(column_type)
        or types.is_fixed_size_list(column_type)
    ):
        return "vector" if _is_number(column_type.value_type) else "nested"
    nested = types.is_nested(column_type) or isinstance(column_type, pa.BaseExtensionType)
    return "nested" if nested else "other"


def _is_number(column_type: Any) -> bool:
    types = pa.types
    return bool(
        types.is_integer(column_type)
        or types.is_floating(column_type)
        or types.is_decimal(column_type)
        or types.is_boolean(column_type)
    )


def _is_binary(column_type: Any) -> bool:
    types = pa.types
    return bool(
        types.is_binary(column_type)
        or types.is_large_binary(column_type)
        or types.is_binary_view(column_type)
    )


def check_nulls(part: Part, column: str, values: Any, *, each: int = 1) -> None:
    """Raise DataError if there is a null among a column's values, `each` for a row."""
    if values.null_count:
        row = pc.index(pc.is_null(values), True).as_py() // each
        raise part.error(column, row, "is null" if each == 1 else "has a null")


def labels(splits: Splits, column: str) -> tuple[dict[str, NDArray[np.int64]], Sequence[Any]]:
    """Return each split's labels [N], and the C classes; training labels may be unknown."""
    values: dict[str, list[Any]] = {split: [] for split in splits}
    for split, part, found in _names(splits, column, "labels"):
        training = split == "train"
        if not training:
            check_nulls(part, column, found)
        for row, value in enumerate(found.to_pylist()):
            least = UNKNOWN if training else 0
            if isinstance(value, int) and not least <= value < MAX_CLASSES:
                unless = f", or null or {UNKNOWN} where unknown" if training else ""
                problem = f"labels must be text, or 0..C-1, C at most {MAX_CLASSES}{unless}"
                raise part.error(column, row, f"is {value}; {problem}")
            values[split].append(None if value == UNKNOWN else value)
    known = {value for part in values.values() for value in part if value is not None}
    is_text = any(isinstance(value, str) for value in known)
    classes = sorted(known) if is_text else range(1 + max(known))
    return {split: numbered(part, classes) for split, part in values.items()}, classes


def clients(
    splits: Splits, column: str
) -> tuple[dict[str, NDArray[np.int64]], Sequence[str] | Sequence[int]]:
    """Return the numbers [N] of the rows' clients, of the splits that have such a column; and all.

    The clients of both splits are numbered together.
    """
    have = {s: parts for s, parts in splits.items() if column in parts[0].table.column_names}
    values: dict[str, list[Any]] = {split: [] for split in have}
    for split, part, found in _names(have, column, "clients"):
        check_nulls(part, column, found)
        values[split] += found.to_pylist()
    among = sorted({value for part in values.values() for value in part})
    return {split: numbered(part, among) for split, part in values.items()}, among


def _names(splits: Splits, column: str, what: str) -> Iterator[tuple[str, Part, Any]]:
    """Yield a column of whole numbers or text, of which it may have one in all files, or nulls."""
    first: tuple[Part, Any] | None = None
    for split, parts in splits.items():
        for part in parts:
            values = _names_or_nulls(part.table.column(column))
            if values.null_count == len(part.rows):  # of any type, for nothing tells which
                yield split, part, values
                continue
            column_type = values.type
            if kind(column_type) not in ("text", "whole"):
                raise DataError(
                    f"{part.name}: {part.place}column {column!r} is {column_type}; {what} must be"
                    " whole numbers or text"
                )
            first = first or (part, column_type)
            if kind(column_type) != kind(first[1]):
                raise DataError(
                    f"{part.name}: {part.place}column {column!r} is {column_type}, but"
                    f" {first[0].place}{first[1]}"
                )
            yield split, part, values


def _names_or_nulls(values: Any) -> Any:
    """Return a column with nulls for NaN and empty texts, and whole numbers if all are whole.

    Of whole numbers of which some are missing pandas makes floating-point ones.
    """
    if kind(values.type) == "text":
        text = values.cast(pa.string())
        return pc.if_else(pc.equal(text, ""), None, text)
    if pa.types.is_floating(values.type):
        with suppress(pa.ArrowInvalid):
            return pc.if_else(pc.is_nan(values), None, values).cast(pa.int64())
    return values


def vectors(splits: Splits, column: str) -> dict[str, NDArray[np.float32]]:
    """Return a column of lists as float32 [N, D] of each split."""
    first = next(part for parts in splits.values() for part in parts if len(part.rows))
    check_nulls(first, column, first.table.column(column))
    length = len(first.table.column(column)[0].as_py())
    if length == 0:
        raise first.error(column, 0, "is an empty list")
    result = {}
    for split, parts in splits.items():
        x = result[split] = np.empty((_count(parts), length), np.float32)
        start = 0
        for part in parts:
            lists = part.table.column(column)
            check_nulls(part, column, lists)
            lengths = pc.list_value_length(lists).to_numpy()
            odd = np.flatnonzero(lengths != length)
            if len(odd):
                problem = f"has {lengths[odd[0]]} numbers, but {first.at(column, 0)} has {length}"
                raise part.error(column, int(odd[0]), f"{problem}; all must have one length")
            values = pc.list_flatten(lists)
            check_nulls(part, column, values, each=length)
            end = start + len(part.rows)
            x[start:end] = _float32(f"{part.name}: {column!r}", values).reshape(-1, length)
            _check_finite(part, column, x[start:end])
            start = end
    return result


def features(splits: Splits, columns: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Return columns of numbers as float32 [N, D] of each split."""
    result = {}
    for split, parts in splits.items():
        x = result[split] = np.empty((_count(parts), len(columns)), np.float32)
        start = 0
        for part in parts:
            end = start + len(part.rows)
            for place, column in enumerate(columns):
                values = part.table.column(column)
                check_nulls(part, column, values)
                x[start:end, place] = _float32(f"{part.name}: {column!r}", values)
                _check_finite(part, column, x[start:end, place, None])
            start = end
    return result


def images(splits: Splits, column: str, *, size: int, grey: bool) -> dict[str, NDArray[np.uint8]]:
    """Return a column of encoded images as uint8 [N, channels, H, W] of each split."""
    decoded: dict[str, list[NDArray[np.uint8]]] = {}
    labels: dict[str, list[tuple[Part, int]]] = {}
    for split, parts in splits.items():
        decoded[split] = []
        labels[split] = [(part, row) for part in parts for row in range(len(part.rows))]
        for part in parts:
            values = part.table.column(column)
            if pa.types.is_struct(values.type):
                values = pc.struct_field(values, "bytes")
            check_nulls(part, column, values)
            for row, value in enumerate(values):
                what = f"{part.name}: {part.at(column, row)}"
                decoded[split].append(decode(what, BytesIO(value.as_py()), size=size, grey=grey))
    name = next(part.name for parts in splits.values() for part in parts)

    def label(split: str, index: int) -> str:
        part, row = labels[split][index]
        return part.at(column, row)

    return stack(name, decoded, label, resizes=True)


def _count(parts: Sequence[Part]) -> int:
    return sum(len(part.rows) for part in parts)


def _float32(what: str, values: Any) -> NDArray[np.float32]:
    numbers: NDArray[Any] = values.to_numpy()
    warn_of_large_integers(what, numbers)
    with np.errstate(over="ignore"):  # what becomes infinite is found by _check_finite
        return numbers.astype(np.float32)


def _check_finite(part: Part, column: str, x: NDArray[np.float32]) -> None:
    """Raise DataError if a row of `x` [N, D] has a value that isn't finite."""
    good = np.isfinite(x).all(axis=1)
    if not good.all():
        problem = "has a value that is NaN or infinite in float32"
        raise part.error(column, int(good.argmin()), problem)
