"""Images in folders: a folder for each split, in it one for each class."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from fedsim.data.files import (
    SPLITS,
    check_file,
    find_file,
    find_folder,
    first_line,
    numbered,
)
from fedsim.data.images import check_size, decode, stack
from fedsim.data.source import Source, display_names
from fedsim.errors import DataError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

# What file managers leave behind, besides what begins with a dot.
_CLUTTER = ("thumbs.db", "desktop.ini")

_CLIENTS = "clients.csv"
_UNLABELLED = "unlabelled"
_MEANT = (_UNLABELLED, "unlabeled")


def folder(location: str, *, flip: bool = False, size: int = 0, grey: bool = False) -> Source:
    """Return the images of a folder.

    Parameters
    ----------
    location : str
        A folder with

        - ``train/CLASS/``, ``test/CLASS/``: the images of a class, at any depth; .png, .jpg,
          .jpeg, .bmp, .gif, .webp, .tif, .tiff, .ppm or .pgm, in capitals too. Of several frames
          the first is taken; an image is turned as its EXIF orientation says. The classes of both
          splits, sorted by name, are the labels 0..C-1. Thumbs.db, desktop.ini and hidden files
          and folders, whose names begin with a dot, are left out.
        - optional ``unlabelled/``: training images whose class nobody knows, at any depth.
        - optional ``clients.csv``: the columns ``file`` and ``client`` tell whose an image is, as
          in ``train/cat/1.png,anna``. It names every training image, unlabelled ones too, and
          every test image or none. Clients are numbered in sorted order, by value if all are
          whole numbers.
    flip : bool
        Whether a flip left to right keeps an image's meaning.
    size : int
        0: all images must have one size. 1 to 4096: the square in the centre of each is cut out
        and resized to `size` x `size`.
    grey : bool
        Whether colours become grey.

    Returns
    -------
    Source
        Images uint8 [N, 1, H, W] if all are grey, else [N, 3, H, W], sorted by path, unlabelled
        ones after the others; with `group_train`, and `group_test`, if there is clients.csv.
        Classes and clients have their names.

    Raises
    ------
    DataError
        If a folder or image is missing, a file is no image or damaged, images differ in size, or
        clients.csv is damaged, names what isn't there, or leaves out an image.
    """
    check_size(size)
    name = f"folder:{location}"
    root = find_folder(name, Path(location))
    if root is None:
        raise DataError(f"{name}: no folder {location}")
    files, classes = _list(name, root)
    images = {
        split: [decode(f"{name}: {file}", root / file, size=size, grey=grey) for file in part]
        for split, part in files.items()
    }
    x = stack(name, images, lambda split, index: str(files[split][index]), resizes=True)
    groups, clients = _groups(name, root, files)
    y = {split: numbered(map(_class_of, part), classes) for split, part in files.items()}
    return Source(
        name=name,
        x_train=x["train"],
        y_train=y["train"],
        x_test=x["test"],
        y_test=y["test"],
        num_classes=len(classes),
        flip=flip,
        group_train=groups.get("train"),
        group_test=groups.get("test"),
        class_names=display_names(classes),
        client_names=display_names(clients),
    )


def _class_of(file: PurePosixPath) -> str | None:
    return None if file.parts[0] == _UNLABELLED else file.parts[1]


def _list(name: str, root: Path) -> tuple[dict[str, list[PurePosixPath]], list[str]]:
    """Return each split's images, relative to `root`, and the classes; all sorted.

    Unlabelled images are the last ones of the split train.
    """
    files, folders = {}, set[str]()
    for split in SPLITS:
        files[split], found = _read_split(name, root, split)
        folders |= found
    classes = {path.parts[1] for part in files.values() for path in part}
    empty = sorted(folders - classes)
    if empty:
        raise DataError(f"{name}: the class {empty[0]!r} has no images; remove its folder")
    _check_spelling(name, root, classes)
    if find_folder(name, root / _UNLABELLED) is not None:
        files["train"] += _read_split(name, root, _UNLABELLED)[0]
    else:
        _check_absent(name, root / _UNLABELLED, "a folder of training images")
    return files, sorted(classes)


def _check_absent(name: str, path: Path, allowed: str) -> None:
    """Raise DataError if there is something that was not found to be what it must be."""
    if os.path.lexists(path):
        raise DataError(f"{name}: {path.name} must be {allowed}, or not be there")


def _check_spelling(name: str, root: Path, classes: set[str]) -> None:
    """Raise DataError if unlabelled images are where they would be left out, or be a class."""
    try:
        others = [path.name for path in sorted(root.iterdir()) if path.is_dir()]
    except OSError as error:
        raise DataError(f"{name}: can't read the folder: {first_line(error)}") from error
    for other in others:
        if other != _UNLABELLED and other.lower() in _MEANT:
            raise DataError(f"{name}: the folder {other} must be called {_UNLABELLED}")
    for label in sorted(classes):
        if label.lower() in _MEANT:
            raise DataError(
                f"{name}: {label} is a class; unlabelled images must be in the folder"
                f" {_UNLABELLED} beside train and test"
            )


def _read_split(name: str, root: Path, split: str) -> tuple[list[PurePosixPath], set[str]]:
    """Return a folder's images, relative to `root` and sorted, and the names of folders in it."""
    if find_folder(name, root / split) is None:
        raise DataError(f"{name}: has no folder {split}")
    try:
        paths = list(_walk(name, root, PurePosixPath(split)))
        folders = {
            path.name
            for path in (root / split).iterdir()
            if path.is_dir() and not path.name.startswith(".")
        }
    except OSError as error:
        raise DataError(f"{name}: can't read the folder {split}: {first_line(error)}") from error
    return [path for path in paths if _is_image(name, path)], folders


def _walk(
    name: str, root: Path, place: PurePosixPath, above: tuple[Path, ...] = ()
) -> Iterator[PurePosixPath]:
    """Yield the files of a folder and of the folders in it, relative to `root`.

    They are sorted, and links are followed; `above` are the folders on the way, without links.
    """
    real = (root / place).resolve()
    if any(folder.is_relative_to(real) for folder in above):
        raise DataError(f"{name}: {place} is a symbolic link to a folder that it is in; remove it")
    for path in sorted((root / place).iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(name, root, place / path.name, (*above, real))
        else:
            check_file(f"{name}: {place / path.name}", path)
            yield place / path.name


def _is_image(name: str, path: PurePosixPath) -> bool:
    """Tell whether a file is to be read; what is neither an image nor clutter is an error."""
    if path.suffix.lower() not in _SUFFIXES:
        if path.name.lower() in _CLUTTER:
            return False
        raise DataError(f"{name}: {path} is no image; allowed: {', '.join(_SUFFIXES)}")
    if len(path.parts) < 3 and path.parts[0] != _UNLABELLED:
        raise DataError(
            f"{name}: {path} is in no class's folder; must be {path.parts[0]}/CLASS/{path.name}"
        )
    return True


def _groups(
    name: str, root: Path, files: dict[str, list[PurePosixPath]]
) -> tuple[dict[str, NDArray[np.int64]], Sequence[str]]:
    """Return the numbers of the images' clients, of the splits that clients.csv names; and all."""
    path = find_file(name, root / _CLIENTS)
    if path is None:
        _check_absent(name, root / _CLIENTS, "a file")
        return {}, ()
    what = f"{name}: {_CLIENTS}"
    client = _read_clients(what, path, {str(file) for part in files.values() for file in part})
    named = {split: [file for file in part if str(file) in client] for split, part in files.items()}
    for split, part in files.items():
        if len(named[split]) < len(part) and (split == "train" or named[split]):
            missing = next(file for file in part if str(file) not in client)
            raise DataError(
                f"{what} names no client for {missing}; must name one for every training image,"
                " and for every test image or none"
            )
    among = _sorted(set(client.values()))
    numbers = {
        split: numbered([client[str(file)] for file in part], among)
        for split, part in named.items()
        if part
    }
    return numbers, among


def _read_clients(what: str, path: Path, known: set[str]) -> dict[str, str]:
    """Return each named file's client."""
    client: dict[str, str] = {}
    try:
        # Spreadsheets write a byte order mark.
        with path.open(encoding="utf-8-sig", newline="") as opened:
            rows = csv.DictReader(opened, strict=True)
            if sorted(rows.fieldnames or []) != ["client", "file"]:
                columns = ",".join(rows.fieldnames or [])
                raise DataError(f"{what} has the columns {columns!r}; must be file,client")
            for row in rows:
                where = f"{what}, line {rows.line_num}"
                # Cells beyond the columns are under None; cells that are missing are None.
                if None in row or None in row.values() or "" in row.values():
                    raise DataError(f"{where} must be a file and its client, both not empty")
                file = row["file"]
                if file not in known:
                    raise DataError(
                        f"{where} names {file!r}, which is no image here; must be as in"
                        " train/CLASS/FILE, with forward slashes"
                    )
                if file in client:
                    raise DataError(f"{where} names {file} a second time")
                client[file] = row["client"]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{what} can't be read: {first_line(error)}") from error
    return client


def _sorted(clients: set[str]) -> Sequence[str]:
    """Sort clients by value if all are whole numbers, else by name."""
    try:
        return sorted(clients, key=lambda client: (int(client), client))
    except ValueError:
        return sorted(clients)
