"""The view from above: things lie where the scene says, and the command writes a picture of both views."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image
from road_worlds import CAR, make_scene, make_town, objects

from navsim_ext.rendering.birds_eye import EGO_COLOUR, FUTURE_COLOUR, birds_eye, main, side_by_side
from navsim_ext.rendering.ground import COLOURS, Surface


def test_things_lie_where_the_scene_says():
    town, size, reach_m = make_town(), 400, 40.0
    scene = make_scene(objects(("vehicle", 30.0, 3.5, 0.0, CAR)), lights=[("11", True)], speed=4.0)
    image = birds_eye(scene, town, size, reach_m).astype(int)
    scale = size / (2 * reach_m)

    def at(x, y) -> np.ndarray:
        return image[round((1.5 * reach_m - x) * scale), round((reach_m - y) * scale)]

    def like(colour, wanted) -> bool:
        return bool(np.abs(colour - np.array(wanted)).max() < 30)

    assert like(at(1.4, 0.0), EGO_COLOUR)
    assert like(at(16.0, 0.0), FUTURE_COLOUR)  # 4 s at 4 m/s
    assert like(at(25.0, -1.0), COLOURS[Surface.ROAD])
    assert like(at(25.0, -10.0), COLOURS[Surface.EARTH])
    empty = birds_eye(make_scene(objects(), lights=[("11", True)], speed=4.0), town, size, reach_m).astype(int)
    rows, columns = np.nonzero((image != empty).any(axis=-1))
    np.testing.assert_allclose(1.5 * reach_m - rows.mean() / scale, 30.0, atol=0.2)
    np.testing.assert_allclose(reach_m - columns.mean() / scale, 3.5, atol=0.2)
    assert len(rows) / scale**2 == pytest.approx(CAR[0] * CAR[1], rel=0.3)  # smoothing widens the outline
    red = (image[..., 0] > 200) & (image[..., 1] < 90)
    assert red.any()
    both = side_by_side(scene, town, 270)
    assert both.shape == (270, 480 + 270, 3)


def test_command_writes_a_picture(reference, tmp_path, monkeypatch, capsys):
    root = reference("golden/navsim/dataset")
    quiet = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
    options = [f"data.root={root}", "height=90", *quiet]
    monkeypatch.setattr(sys, "argv", ["picture", *options, f"output={tmp_path / 'scene.png'}"])
    main()
    with Image.open(tmp_path / "scene.png") as picture:
        assert picture.size == (160 + 90, 90)
    monkeypatch.setattr(sys, "argv", ["picture", *options, f"output={tmp_path / 'scene.txt'}"])
    with pytest.raises(SystemExit):
        main()
    assert "ends in .png" in capsys.readouterr().err
