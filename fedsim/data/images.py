"""Images as arrays: decoded by Pillow, in grey or in colour, stacked to one array.

Shapes: N images, each [H, W] if it is grey, else [H, W, 3].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fedsim.checks import check, is_whole
from fedsim.data.files import first_line
from fedsim.errors import DataError

# Others aren't tried: some of Pillow's readers start programs, such as Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")

# Pillow's modes of 8 bits or less, and what they are read as.
_MODES = {
    "1": "L",
    "L": "L",
    "LA": "L",
    "P": "RGB",
    "RGB": "RGB",
    "RGBA": "RGB",
    "CMYK": "RGB",
    "YCbCr": "RGB",
}


MAX_SIZE = 4096
"""Pixels a side that images are resized to at most."""


def check_size(size: int) -> None:
    """Raise `DataError` if images can't be resized to ``data.size``; 0 leaves them as they are."""
    allowed = f"a whole number from 0 to {MAX_SIZE}"
    check(is_whole(size) and 0 <= size <= MAX_SIZE, "data.size", size, allowed)


def decode(
    what: str, file: Path | IO[bytes], *, size: int = 0, grey: bool = False
) -> NDArray[np.uint8]:
    """Read an encoded image: PNG, JPEG, BMP, GIF, WebP, TIFF, PPM or PGM.

    Of several frames the first is taken. An image is turned as its EXIF orientation says.
    Transparent pixels are laid on white.

    Parameters
    ----------
    what : str
        How an error's line begins: the source and the image.
    file : Path or file object
        Where to read it.
    size : int
        If above 0, the square in the centre is cut out and resized to `size` x `size`.
    grey : bool
        Whether colours become grey.

    Returns
    -------
    uint8 [H, W] or [H, W, 3]
        The pixels.

    Raises
    ------
    DataError
        If it is none of these formats, is damaged or cut short, has so many pixels that Pillow
        takes it for a decompression bomb, or more than 8 bits a channel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_FORMATS) as opened:
                image = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError as error:  # its text shows how the file was opened
        raise DataError(
            f"{what}: can't read the image: it is none of {', '.join(_FORMATS)}, or its header is"
            " damaged"
        ) from error
    except Exception as error:  # Pillow lets all kinds through
        raise DataError(f"{what}: can't read the image: {first_line(error)}") from error
    return pixels(what, image, size=size, grey=grey)


def pixels(what: str, image: Any, *, size: int = 0, grey: bool = False) -> NDArray[np.uint8]:
    """Return the pixels of one of Pillow's images; else as `decode`."""
    mode = getattr(image, "mode", None)
    if mode not in _MODES:
        raise DataError(f"{what} has the pixel mode {mode}; allowed: {', '.join(_MODES)}")
    if mode in ("P", "LA", "RGBA"):
        image = image.convert("RGBA")
        # What lies under transparent pixels nobody was meant to see.
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(_MODES[mode])
    if grey:
        image = image.convert("L")
    if size:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def stack(
    what: str,
    images: Mapping[str, list[NDArray[np.uint8]]],
    label: Callable[[str, int], str],
    *,
    resizes: bool = False,
) -> dict[str, NDArray[np.uint8]]:
    """Return the images of each split as one array; grey ones get 3 channels among coloured ones.

    Parameters
    ----------
    what : str
        How an error's line begins: the source.
    images : mapping of str to list of uint8 [H, W] or [H, W, 3]
        The images of each split, at least one.
    label : function
        Returns what messages call an image, by its split and its place there.
    resizes : bool
        Whether ``data.size`` makes images of several sizes one.

    Returns
    -------
    dict of str to uint8 [N, channels, H, W]
        One channel if the images of all splits are grey, else 3.

    Raises
    ------
    DataError
        If a split has no image, or an image has another size than the very first one.
    """
    for split, part in images.items():
        if not part:
            raise DataError(f"{what}: {split} has no images")
    first = next(iter(images))
    height, width = images[first][0].shape[:2]
    channels = 3 if any(image.ndim == 3 for part in images.values() for image in part) else 1
    remedy = ", or set data.size, to which all are resized" if resizes else ""
    stacked = {}
    for split, part in images.items():
        x = stacked[split] = np.empty((len(part), channels, height, width), np.uint8)
        for index, image in enumerate(part):
            if image.shape[:2] != (height, width):
                raise DataError(
                    f"{what}: {label(split, index)} has {image.shape[0]} x {image.shape[1]} pixels,"
                    f" but {label(first, 0)} {height} x {width}; all must have one size{remedy}"
                )
            x[index] = np.moveaxis(image, 2, 0) if image.ndim == 3 else image
    return stacked
