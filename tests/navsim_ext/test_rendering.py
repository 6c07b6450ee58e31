"""The renderer against geometry: where things must appear, what hides what, what colours must show."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from road_worlds import CAR, EGO, SIZE, front, make_town, objects, to_map

from navsim_ext.errors import DataError
from navsim_ext.frames import rotate
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.readers import NavsimLogs, open_source
from navsim_ext.rendering import ground
from navsim_ext.rendering.camera import (
    FULL_SIZE,
    CameraView,
    box_corners,
    camera_rig,
    clip_near,
    resize_camera,
)
from navsim_ext.rendering.ground import Surface, crosswalk, ground_of, strips, without_holes
from navsim_ext.rendering.objects import braking_tracks, model_name, models, paint_order
from navsim_ext.rendering.renderer import render, render_instances, render_scene, scene_camera
from navsim_ext.rendering.signals import signals_near
from navsim_ext.scene import CAMERAS, OBJECT_TYPES, Annotations

NOTHING = objects()


@pytest.fixture(scope="module")
def town() -> VectorMap:
    return make_town()


def test_pixels_of_known_points():
    """A point d m ahead of the camera and r m to the right appears f r / d right of the principal point."""
    camera = camera_rig(FULL_SIZE)["CAM_F0"]
    view = CameraView.of(camera)
    ahead = view.position + np.array([20.0, -3.0, -0.5])
    pixel, depth = view.project(ahead)
    np.testing.assert_allclose(pixel, (960 + 1545 * 3 / 20, 560 + 1545 * 0.5 / 20))
    assert depth == pytest.approx(20.0)
    assert np.isnan(view.project(view.position - np.array([5.0, 0.0, 0.0]))[0]).all()
    assert view.horizon_row == pytest.approx(560.0)


@pytest.mark.parametrize("name", CAMERAS)
def test_every_camera_of_the_rig_looks_its_way(name):
    yaw = {"F0": 0, "L0": 55, "L1": 110, "L2": 145, "R0": -55, "R1": -110, "R2": -145, "B0": 180}[name[-2:]]
    view = CameraView.of(camera_rig(SIZE)[name])
    np.testing.assert_allclose(view.rotation @ view.rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(view.rotation) == pytest.approx(1.0)
    direction = np.array([np.cos(np.radians(yaw)), np.sin(np.radians(yaw)), 0.0])
    (u, v), depth = view.project(view.position + 30.0 * direction)
    assert (u, v, depth) == pytest.approx((0.5 * SIZE[0], 560 / 4, 30.0))
    left, _ = view.project(view.position + 30.0 * direction + 3.0 * np.array([-direction[1], direction[0], 0.0]))
    assert left[0] < u


def test_lidar_frame_and_other_sizes():
    camera, lidar2ego = front(), np.eye(4)
    lidar2ego[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    lidar2ego[:3, 3] = (1.0, 0.0, 2.0)
    moved = CameraView.of(camera, lidar2ego)
    np.testing.assert_allclose(moved.position, (1.0, 1.68, 3.56))
    np.testing.assert_allclose(moved.rotation[:, 2], (0.0, 1.0, 0.0), atol=1e-12)  # it looks to the left now
    np.testing.assert_allclose(resize_camera(camera, SIZE, (960, 540)).intrinsics, front((960, 540)).intrinsics)
    with pytest.raises(DataError, match=r"\(500, 500\) is not 16:9"):
        camera_rig((500, 500))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-10, 10)] * 3), min_size=3, max_size=3))
def test_clipping_a_triangle_keeps_exactly_what_lies_ahead(points):
    triangle = np.array(points)
    kept = clip_near(triangle, 0.5)
    assert (kept[:, 2] >= 0.5 - 1e-9).all()
    weights = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    if not len(kept):
        assert ((weights @ triangle)[:, 2] < 0.5 + 1e-9).all()
        return
    for plane in ((0, 2), (1, 2)):  # areas of two projections: what was cut off plus what is kept is the whole
        behind = clip_near(triangle * (1, 1, -1), -0.5) * (1, 1, -1)
        area = lambda ring: shapely.Polygon(ring).area if len(ring) >= 3 else 0.0  # noqa: E731
        total = area(kept[:, plane]) + area(behind[:, plane])
        assert total == pytest.approx(area(triangle[:, plane]), abs=1e-6)


@pytest.mark.parametrize("kind", OBJECT_TYPES)
@pytest.mark.parametrize("camera", ["CAM_F0", "CAM_L1", "CAM_B0"])
def test_a_box_of_the_log_hits_its_pixels(town, kind, camera):
    """All drawn pixels lie inside the projected box, and they fill most of it."""
    size = CAR if kind == "vehicle" else (0.8, 0.8, 1.6)
    yaw = {"CAM_F0": 0.0, "CAM_L1": np.radians(110), "CAM_B0": np.pi}[camera]
    x, y = 9.0 * np.cos(yaw) + 0.4, 9.0 * np.sin(yaw) + 0.8
    thing = objects((kind, x, y, 0.7, size))
    rig = camera_rig(SIZE)[camera]
    found = render_instances(town, thing, EGO, (), rig, SIZE) == 1
    corners, _ = CameraView.of(rig).project(box_corners(thing.boxes)[0])
    hull = shapely.MultiPoint(corners).convex_hull
    rows, columns = np.nonzero(found)
    assert len(rows) > 50
    assert shapely.contains_xy(hull.buffer(1.0), columns, rows).all()
    share = len(rows) / shapely.intersection(hull, shapely.box(0, 0, *SIZE)).area
    assert share > {"pedestrian": 0.6, "bicycle": 0.3, "traffic_cone": 0.25}.get(kind, 0.6)
    (u, v), _ = CameraView.of(rig).project(thing.boxes[0, :3])
    assert found[round(v), round(u)]


def test_models_stay_inside_their_boxes():
    for name, model in models().items():
        vertices = np.array(model.vertices)
        assert np.abs(vertices).max() <= 0.5 + 1e-12, name
        for indices, _ in model.faces:
            ring = vertices[list(indices)]
            normal = np.cross(ring[1] - ring[0], ring[2] - ring[1])
            assert np.abs((ring - ring[0]) @ normal).max() < 1e-9, (name, "face is not flat")
    assert model_name("vehicle", np.array([0, 0, 0, 12.0, 2.5, 3.2, 0])) == "lorry"


def test_nearer_boxes_hide_farther_ones(town):
    """A lorry, a car right behind it and one beside it, whichever order they are listed in."""
    near, behind, beside = (
        ("vehicle", 12.0, 0.0, 0.0, (9.0, 2.5, 3.2)),
        ("vehicle", 22.0, 0.0, 0.0, CAR),
        ("vehicle", 18.0, 3.4, 0.0, CAR),
    )
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        things = [(near, behind, beside)[k] for k in order]
        found = render_instances(town, objects(*things), EGO, (), front(), SIZE)
        counts = {order[k]: int((found == k + 1).sum()) for k in range(3)}
        assert counts[0] > 1000
        assert counts[1] == 0
        assert counts[2] > 300


def test_a_long_lorry_hides_what_stands_behind_it_though_its_middle_is_farther(town):
    """By distance of the middles the person would be nearer; the lorry's long side separates the two."""
    lorry, person = ("vehicle", 14.0, 2.0, 0.0, (16.0, 2.5, 3.5)), ("pedestrian", 10.5, 4.6, 0.0, (0.7, 0.7, 1.7))
    assert np.hypot(10.5, 4.6) < np.hypot(14.0, 2.0)
    for things in ((lorry, person), (person, lorry)):
        index = things.index(person) + 1
        alone = render_instances(town, objects(person), EGO, (), front(), SIZE) == 1
        both = render_instances(town, objects(*things), EGO, (), front(), SIZE)
        assert alone.sum() > 200
        assert (both[alone] == index).sum() == 0
    footprints = box_corners(objects(lorry, person).boxes)[:, :4, :2]
    assert paint_order(footprints, np.array([1.68, 0.0])) == [1, 0]
    assert paint_order(footprints, np.array([1.68, 9.0])) == [0, 1]  # from the other side the person is in front


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_painting_order_equals_ray_casting(data):
    """For disjoint footprints the order decides every ray as the nearest hit does."""
    count = data.draw(st.integers(2, 7))
    boxes: list[shapely.Polygon] = []
    for _ in range(count):
        x, y = data.draw(st.floats(-20, 20)), data.draw(st.floats(-20, 20))
        length, width, yaw = data.draw(st.floats(0.3, 14)), data.draw(st.floats(0.3, 3)), data.draw(st.floats(-3, 3))
        polygon = shapely.Polygon(box_corners([(x, y, 0, length, width, 1, yaw)])[0, :4, :2])
        if polygon.distance(shapely.Point(0, 0)) > 0.5 and all(polygon.distance(other) > 0.05 for other in boxes):
            boxes.append(polygon)
    if len(boxes) < 2:
        return
    footprints = np.array([shapely.get_coordinates(polygon.exterior)[:4] for polygon in boxes])
    order = paint_order(footprints, np.zeros(2))
    assert sorted(order) == list(range(len(boxes)))
    rank = {index: position for position, index in enumerate(order)}
    for angle in np.linspace(0, 2 * np.pi, 73):
        ray = shapely.LineString([(0, 0), (60 * np.cos(angle), 60 * np.sin(angle))])
        hits = {k: shapely.intersection(ray, polygon).distance(shapely.Point(0, 0)) for k, polygon in enumerate(boxes)
                if ray.intersects(polygon)}  # fmt: skip
        if hits:
            nearest = min(hits, key=lambda k: hits[k])
            assert all(rank[nearest] >= rank[k] for k in hits)


def test_a_box_across_the_image_border_and_the_camera_plane(town):
    beside = objects(("vehicle", 3.0, 2.6, 0.0, (14.0, 2.4, 3.2)))  # reaches from behind the camera to ahead of it
    found = render_instances(town, beside, EGO, (), front(), SIZE)
    assert (found[:, 0] == 1).any()
    assert not (found[:, -1] == 1).any()
    assert render_instances(town, objects(("vehicle", -9.0, 0.0, 0.0, CAR)), EGO, (), front(), SIZE).max() == 0


def pixel(image: np.ndarray, point, camera=None, size=SIZE) -> np.ndarray:
    """Colour at a point of the ego frame."""
    (u, v), _ = CameraView.of(camera or front(size)).project(np.asarray(point, float))
    return image[round(v), round(u)].astype(int)


def is_like(colour: np.ndarray, surface: Surface, tolerance: int = 26) -> bool:
    return np.abs(colour - np.array(ground.COLOURS[surface])).max() <= tolerance


def test_road_earth_sky_and_markings(town):
    size = (960, 540)
    image = render(town, NOTHING, EGO, (), front(size), size)
    assert image.shape == (540, 960, 3)
    assert image.dtype == np.uint8
    assert is_like(pixel(image, (12, 0.0, 0), size=size), Surface.ROAD)
    assert is_like(pixel(image, (14, -6.0, 0), size=size), Surface.EARTH)
    sky = image[10, 480].astype(int)
    assert sky[2] > sky[0] + 40
    assert is_like(pixel(image, (12, -1.75, 0), size=size), Surface.WHITE_LINE)  # right edge of the right lane
    assert is_like(pixel(image, (20, 5.25, 0), size=size), Surface.YELLOW_LINE, 40)  # towards oncoming traffic
    along = [pixel(image, (x, 1.75, 0), size=size).mean() for x in np.arange(8.0, 30.0, 0.5)]
    assert np.ptp(along) > 80  # the shared border is broken: light and dark in turn
    across = [pixel(image, (42, y, 0), size=size).mean() for y in np.arange(-1.5, 5.0, 0.1)]
    assert np.ptp(across) > 60  # zebra stripes
    stop = [pixel(image, (x, 0.0, 0), size=size).mean() for x in (57.0, 59.45)]
    assert stop[1] > stop[0] + 40


def test_road_lies_where_the_map_says_for_any_pose(town):
    """Moving ego and camera through the world: the picture shows road exactly where the road polygon is."""
    road = shapely.union_all([*town.roadblocks.polygons, *town.roadblock_connectors.polygons])
    random = np.random.default_rng(3)
    hits = total = 0
    for name in ("CAM_F0", "CAM_L0", "CAM_B0"):
        camera = camera_rig(SIZE)[name]
        view = CameraView.of(camera)
        for _ in range(4):
            pose = np.array([*to_map([(random.uniform(-10, 50), random.uniform(-1, 4))])[0], random.uniform(-3, 3)])
            image = render(town, NOTHING, pose, (), camera, SIZE).astype(int)
            for row in range(160, SIZE[1], 6):
                for column in range(0, SIZE[0], 6):
                    ray = view.rotation @ np.linalg.solve(view.intrinsics, (column, row, 1.0))
                    ground = view.position + ray * (-view.position[2] / ray[2])
                    spot = pose[:2] + rotate(ground[:2], pose[2])
                    depth = float(np.linalg.norm(ground[:2] - view.position[:2]))
                    row_m = depth**2 / (view.intrinsics[1, 1] * view.position[2])  # ground that one row covers
                    if shapely.Point(spot).distance(road.boundary) < 0.2 + 1.5 * row_m:
                        continue
                    inside = road.contains(shapely.Point(spot))
                    red, green, blue = image[row, column]
                    earth = green - red > 5 and green - blue > 12  # everything on the road is grey, white or yellow
                    total += 1
                    hits += inside != earth
    assert total > 2000
    assert hits == total


@pytest.mark.parametrize("is_red", [True, False])
def test_traffic_lights_show_their_state(town, is_red):
    size = (960, 540)
    signals = signals_near(town, [("11", is_red), ("12", is_red)], EGO[:2], 100.0)
    assert {signal.connectors for signal in signals} == {("11",), ("12",)}
    assert sum(signal.on_post for signal in signals) == 1  # the right lane's
    image = render(town, NOTHING, EGO, [("11", is_red), ("12", is_red)], front(size), size).astype(int)
    red = (image[..., 0] > 200) & (image[..., 1] < 90) & (image[..., 2] < 90)
    green = (image[..., 1] > 180) & (image[..., 0] < 110)
    assert red.any() == is_red
    assert green.any() == (not is_red)
    instances = render_instances(town, NOTHING, EGO, [("11", is_red)], front(), SIZE)
    assert (instances == -1).any()
    dark = render(town, NOTHING, EGO, (), front(size), size).astype(int)
    assert not ((dark[..., 0] > 200) & (dark[..., 1] < 90)).any()


def test_lanes_whose_connectors_disagree_get_two_heads(town):
    both = signals_near(town, [("11", True), ("12", False)], EGO[:2], 100.0)
    assert sorted((signal.connectors, signal.is_red) for signal in both if not signal.on_post) == [
        (("11",), True), (("12",), False),
    ]  # fmt: skip
    assert signals_near(town, [("99", True)], EGO[:2], 100.0) == []


def test_brake_lights(town):
    size, car = (960, 540), objects(("vehicle", 12.0, 0.0, 0.0, CAR))
    lit = render(town, car, EGO, (), front(size), size, braking={"t0"}).astype(int)
    off = render(town, car, EGO, (), front(size), size).astype(int)
    bright = lambda image: int(((image[..., 0] > 220) & (image[..., 1] < 80)).sum())  # noqa: E731
    assert bright(lit) > 50
    assert bright(off) == 0


def test_who_brakes():
    def frames(*speeds):
        tokens, names = ("slowing", "queue", "parked", "walker"), ("vehicle", "vehicle", "vehicle", "pedestrian")
        return [Annotations(np.zeros((4, 7)), np.array([(v, 0, 0) for v in row]), names, tokens) for row in speeds]

    window = frames((8.0, 3.0, 0.0, 2.0), (8.0, 0.1, 0.0, 1.0), (7.0, 0.1, 0.0, 0.0))
    assert braking_tracks(window, 2, 0.5) == {"slowing", "queue"}
    assert braking_tracks(window, 1, 0.5) == {"queue"}


def test_pictures_are_deterministic(town):
    arguments = (town, objects(("vehicle", 14.0, 1.0, 0.2, CAR)), EGO, [("11", True)], front(), SIZE)
    np.testing.assert_array_equal(render(*arguments), render(*arguments))


def test_ground_pieces():
    outer, inner = shapely.box(0, 0, 10, 10), [shapely.box(2, 2, 3, 3), shapely.box(6, 5, 8, 9)]
    polygon = outer.difference(shapely.union_all(inner))
    pieces = without_holes(polygon)
    assert not any(piece.interiors for piece in pieces)
    assert shapely.union_all(pieces).symmetric_difference(polygon).area < 1e-9
    stripes = crosswalk(shapely.Polygon([(0, 0), (10, 0), (10, 3), (0, 3)]))
    assert 8 <= len(stripes) <= 10
    assert sum(shapely.Polygon(stripe).area for stripe in stripes) == pytest.approx(15.0, rel=0.1)
    dashes = strips(np.array([(0, 0), (75, 0)], float), 0.2, 3.0, 4.5)
    assert len(dashes) == 10
    assert sum(shapely.Polygon(dash).area for dash in dashes) == pytest.approx(10 * 3 * 0.2, rel=1e-6)
    assert strips(np.zeros((3, 2)), 0.2, 3.0, 4.5) == []


def test_ground_is_built_once_per_map_and_forgotten_with_it(town):
    assert ground_of(town) is ground_of(town)
    other = VectorMap(**{name: getattr(town, name) for name in town.__dataclass_fields__})
    key = id(other)
    ground_of(other)
    assert key in ground._GROUNDS
    del other
    assert key not in ground._GROUNDS


def test_bad_input(town):
    with pytest.raises(DataError, match="ego_global"):
        render(town, NOTHING, [0.0, np.nan, 0.0], (), front(), SIZE)


def test_scenes_of_the_reference_sets(reference):
    """Boxes of real logs hit their pixels through the cameras of the log."""
    root = reference("golden/navsim/dataset")
    source = NavsimLogs(root, "trainval")
    checked = 0
    for token in source.tokens[::4]:
        scene = source.scene(token)
        vector_map = source.map_for(scene)
        for name in ("CAM_F0", "CAM_R0"):
            camera = scene_camera(scene, name, SIZE)
            now = scene.annotations[scene.now]
            found = render_instances(vector_map, now, scene.ego_global[scene.now], (), camera, SIZE)
            view = CameraView.of(camera, scene.lidar2ego)
            for index in range(len(now.names)):
                rows, columns = np.nonzero(found == index + 1)
                if len(rows):
                    corners, depth = view.project(box_corners(now.boxes[index])[0])
                    if depth.min() > 0.5:
                        hull = shapely.MultiPoint(corners).convex_hull.buffer(1.5)  # a pixel's diagonal
                        assert shapely.contains_xy(hull, columns, rows).all()
                        checked += 1
    assert checked > 10


def test_a_real_scene_without_cameras(reference):
    source = open_source(reference("real/nuscenes_mini"), "", scene_filter=None)
    scene = source.scenes_of("scene-1077")[2]
    image = render_scene(scene, source.map_for(scene), size=SIZE).astype(int)
    below = image[SIZE[1] - 60 :]
    road = np.abs(below - np.array(ground.COLOURS[Surface.ROAD])).max(axis=-1) < 20
    assert road.mean() > 0.3
    with pytest.raises(DataError, match="CAM_X"):
        render_scene(scene, source.map_for(scene), camera="CAM_X")
