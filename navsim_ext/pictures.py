"""Pictures of unknown origin: size from the header, and the pixels as 8-bit RGB or a named error.

Cameras and other people's data sets hold more than 8-bit RGB. Pillow's ``convert("RGB")`` clips what is deeper: a
16-bit picture becomes white, one of floats from 0 to 1 black. Here they keep their brightness:

    8 bits, palettes, grey, CMYK    as Pillow converts them
    16 bits (v of 65,535)           255 v / 65,535, rounded
    floats within [0, 1]            255 v, rounded; within [0, 255]: v, rounded
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from navsim_ext.errors import DataError, MissingError

MAX_PIXELS = 100_000_000  # the largest cameras have 50 million; beyond it a small file takes all memory
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_LARGEST_16_BIT = 65_535


class BadPicture(DataError):
    """A file that is no picture, is cut short, or is larger or deeper than a camera's."""


def picture_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) from the header. Raises MissingError or BadPicture."""
    with _opened(path) as picture:
        return picture.size


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """The decoded picture in 8-bit RGB. Raises MissingError or BadPicture naming file and remedy."""
    with _opened(path) as picture:
        return _as_rgb(picture, path)


def stored_kind(content: bytes) -> str:
    """Which kind of picture (JPEG, PNG ...) came as bytes, inside another file; all of it is looked at. BadPicture."""
    with _opened(io.BytesIO(content), f"of {len(content):,} bytes") as picture:
        picture.verify()
        return picture.format or ""


@contextmanager
def _opened(file: str | os.PathLike[str] | io.BytesIO, name: str = "") -> Iterator[Image.Image]:
    path = name or file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(file) as picture:
                width, height = picture.size
                if width < 1 or height < 1 or width * height > MAX_PIXELS:
                    raise BadPicture(
                        f"picture {path} has {width:,} x {height:,} pixels; 1 to {MAX_PIXELS:,} are read: make it "
                        "smaller"
                    )
                yield picture
    except DataError:
        raise
    except FileNotFoundError as error:
        raise MissingError(f"picture {path} does not exist: check the folder that its path starts at") from error
    except Exception as error:
        raise BadPicture(
            f"picture {path} cannot be read ({type(error).__name__}: {error!s:.200}): get it again"
        ) from error


def _as_rgb(picture: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    if picture.mode in _DEEP:
        values = np.asarray(picture).astype(np.float64)
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > _LARGEST_16_BIT:
            raise BadPicture(f"picture {path} has values from {low:g} to {high:g}; 16 bits were expected: save 8 bits")
        return _grey(values * (255.0 / _LARGEST_16_BIT))
    if picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(values).all() or low < 0 or high > 255:
            raise BadPicture(
                f"picture {path} has floats from {low:g} to {high:g}; finite ones within [0, 1] or [0, 255] were "
                "expected: save it with 8 bits"
            )
        return _grey(values * 255.0 if high <= 1 else values)
    return picture.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
