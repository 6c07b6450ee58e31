"""Pictures keep their brightness whatever their depth; what is no picture, or too large a one, is named."""

from __future__ import annotations

import ast
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from navsim_ext.errors import MissingError
from navsim_ext.pictures import MAX_PIXELS, BadPicture, open_picture, picture_size

ROOT = Path(__file__).resolve().parents[2]
GREY = np.add.outer(np.arange(0, 160, 10), np.arange(0, 96, 4)).astype(np.uint8)  # [16,24]


def saved(path: Path, values: np.ndarray, mode: str | None = None) -> Path:
    picture = Image.fromarray(values)
    (picture.convert(mode) if mode else picture).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("8.png", GREY),
        ("16.png", GREY.astype(np.uint16) * 257),
        ("16.tiff", GREY.astype(np.uint16) * 257),
        ("32.tiff", GREY.astype(np.int32) * 257),
        ("unit.tiff", (GREY / 255.0).astype(np.float32)),
        ("float.tiff", GREY.astype(np.float32)),
        ("rgb.png", np.repeat(GREY[..., None], 3, axis=2)),
        ("rgba.png", np.dstack([GREY, GREY, GREY, np.full_like(GREY, 255)])),
    ],
)
def test_every_depth_gives_the_picture_of_8_bits(tmp_path, name, values):
    path = saved(tmp_path / name, values)
    assert picture_size(path) == (24, 16)
    found = open_picture(path)
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.repeat(GREY[..., None], 3, axis=2))


@pytest.mark.parametrize("value", [-1.0, 300.0, np.nan, np.inf])
def test_floats_without_a_brightness_are_named(tmp_path, value):
    values = GREY.astype(np.float32)
    values[3, 4] = value
    with pytest.raises(BadPicture, match=r"f\.tiff has floats.*8 bits"):
        open_picture(saved(tmp_path / "f.tiff", values))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_small_file_that_unpacks_to_a_giant_is_refused_by_its_header(tmp_path):
    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))))
    for read in (picture_size, open_picture):
        with pytest.raises(BadPicture, match="bomb"):
            read(path)
    assert 100_000**2 > MAX_PIXELS


def test_what_is_no_picture_is_named(tmp_path):
    whole = saved(tmp_path / "whole.png", GREY).read_bytes()
    for number, content in enumerate([b"", b"text", whole[:30], whole[: len(whole) // 2], b"\0" * 100]):
        path = tmp_path / f"{number}.png"
        path.write_bytes(content)
        with pytest.raises(BadPicture, match=rf"{number}\.png.*again"):
            open_picture(path)
    with pytest.raises(MissingError, match=r"nowhere\.png"):
        open_picture(tmp_path / "nowhere.png")
    with pytest.raises(BadPicture):
        open_picture(tmp_path)


def test_pictures_are_opened_in_one_place():
    found = set()
    for package in ("navsim_ext", "stage1_vlm", "stage2_dit", "stage3_grpo"):
        for path in (ROOT / package).rglob("*.py"):
            calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
            if any(ast.unparse(call.func) == "Image.open" and "buffer" not in ast.unparse(call) for call in calls):
                found.add(str(path.relative_to(ROOT)))
    assert found == {"navsim_ext/pictures.py"}
