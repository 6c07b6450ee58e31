"""Dynamic tiling against the published rule, reimplemented here on its own from the paper's description."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stage1_vlm.internvl import IMAGENET_MEAN, IMAGENET_STD, InternVLProcessor

TILE = 448


def published_grid(width: int, height: int, most: int) -> tuple[int, int]:
    """(columns, rows): nearest aspect ratio; among equals the larger grid if the picture fills half of it."""
    grids = {(c, r) for n in range(1, most + 1) for c in range(1, n + 1) for r in range(1, n + 1) if 1 <= c * r <= most}
    best, best_difference = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif difference == best_difference and width * height > 0.5 * TILE * TILE * columns * rows:
            best = (columns, rows)
    return best


def published_tiles(picture: Image.Image, most: int, tile: int) -> np.ndarray:
    """[T,3,tile,tile]: resize to the grid, cut row by row, thumbnail last, ImageNet statistics."""
    columns, rows = published_grid(*picture.size, most)
    whole = picture.resize((tile * columns, tile * rows), Image.Resampling.BICUBIC)
    pieces = [
        whole.crop((c * tile, r * tile, (c + 1) * tile, (r + 1) * tile)) for r in range(rows) for c in range(columns)
    ]
    if len(pieces) > 1:
        pieces.append(picture.resize((tile, tile), Image.Resampling.BICUBIC))
    values = np.stack([np.asarray(piece, dtype=np.float64) / 255.0 for piece in pieces])
    return ((values - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def processor(tiny_internvl) -> InternVLProcessor:
    return InternVLProcessor.from_pretrained(tiny_internvl, tokens_per_tile=256, tile=TILE, max_tiles=12)


@settings(max_examples=600, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), most=st.integers(1, 16))
def test_every_size_gets_the_published_number_of_tiles(processor, width, height, most):
    columns, rows = published_grid(width, height, most)
    tiles = columns * rows + (columns * rows > 1)
    processor.image_processor.max_patches = most
    try:
        assert processor.image_tokens(width, height) == 256 * tiles
    finally:
        processor.image_processor.max_patches = 12


@pytest.mark.parametrize("size", [(1920, 1080), (480, 270), (300, 900), (448, 448), (1000, 990)])
def test_pixels_equal_the_published_preprocessing(processor, make_picture, size):
    picture = make_picture(3, *size)
    found = processor.pixels([picture])["pixel_values"].numpy()
    np.testing.assert_allclose(found, published_tiles(picture, 12, TILE), atol=2e-6)
    assert len(found) * 256 == processor.image_tokens(*size)


def test_navsim_front_camera_is_nine_tiles(processor):
    assert processor.image_tokens(1920, 1080) == 9 * 256


def test_pictures_of_one_conversation_share_the_tiles(processor, make_picture):
    wide, tall = make_picture(1, 800, 400), make_picture(2, 300, 900)
    expected = np.concatenate([published_tiles(picture, 6, TILE) for picture in (wide, tall)])
    np.testing.assert_allclose(processor.pixels([wide, tall])["pixel_values"].numpy(), expected, atol=2e-6)
    counts = [processor.image_tokens(*picture.size, pictures=2) for picture in (wide, tall)]
    assert sum(counts) == 256 * len(expected)
    assert processor.image_tokens(800, 400, pictures=40) == 256  # never less than one tile


def test_a_bound_only_lowers_what_the_checkpoint_states_unless_exact(tiny_internvl):
    from stage1_vlm.loading import load_processor

    own = load_processor(tiny_internvl).settings()["max_tiles"]  # 12 tiles of 4 tokens
    assert load_processor(tiny_internvl, max_image_tokens=3072).settings()["max_tiles"] == own == 12
    assert load_processor(tiny_internvl, max_image_tokens=16).settings()["max_tiles"] == 4
    assert load_processor(tiny_internvl, max_image_tokens=64, exact=True).settings()["max_tiles"] == 16


def test_statistics_are_imagenet_whatever_the_file_says(tiny_internvl, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(tiny_internvl, tmp_path / "copy")
    path = folder / "preprocessor_config.json"
    content = json.loads(path.read_text()) | {"image_mean": [0.5, 0.5, 0.5], "crop_to_patches": False}
    path.write_text(json.dumps(content))
    loaded = InternVLProcessor.from_pretrained(folder, tokens_per_tile=4, tile=56)
    assert loaded.settings()["mean"] == list(IMAGENET_MEAN)
    assert loaded.image_tokens(800, 400) > 4
