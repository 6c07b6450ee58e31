"""A traffic scene from above, as a picture.

    python -m navsim_ext.traffic.picture scenes=STORE scene=ID output=scene.png

Road edges black, lanes grey (route green), paint as it is, crosswalks striped, stop lines and signs red, lights as
dots in their colour. Road users in the colour of their kind, the ego cyan; static ones pale, those to predict outlined.
History dotted behind them, recorded future as a line ahead. Those observed at another step only are not drawn.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image, ImageDraw

from navsim_ext.errors import DataError
from navsim_ext.files import atomic_stream
from navsim_ext.runtime.config import job
from navsim_ext.traffic.codes import LANES, LINES, POLYGONS, AgentKind, LightState, LineType, PieceKind, Role
from navsim_ext.traffic.findings import box_corners
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import TrafficStore

logger = logging.getLogger(__name__)

SUPERSAMPLE = 2
GROUND, LANE, ROUTE, EDGE = (246, 246, 243), (205, 207, 212), (120, 190, 140), (30, 30, 30)
AREAS = {
    PieceKind.CROSSWALK: (226, 226, 232), PieceKind.SPEED_BUMP: (240, 226, 200), PieceKind.DRIVEWAY: (236, 236, 230),
    PieceKind.DRIVABLE_AREA: (232, 233, 236),
}  # fmt: skip
WHITE_PAINT, YELLOW_PAINT, STOP = (160, 165, 175), (214, 170, 40), (200, 40, 40)
YELLOW = (LineType.BROKEN_YELLOW, LineType.DOUBLE_BROKEN_YELLOW, LineType.SOLID_YELLOW, LineType.DOUBLE_SOLID_YELLOW,
          LineType.PASSING_DOUBLE_YELLOW)  # fmt: skip
EGO = (20, 160, 200)
KINDS = {AgentKind.VEHICLE: (84, 104, 140), AgentKind.PEDESTRIAN: (194, 86, 59), AgentKind.CYCLIST: (184, 137, 43),
         AgentKind.OTHER: (130, 130, 130)}  # fmt: skip
LIGHTS = {
    LightState.STOP: (210, 30, 30), LightState.ARROW_STOP: (210, 30, 30), LightState.FLASHING_STOP: (240, 120, 120),
    LightState.CAUTION: (240, 190, 20), LightState.ARROW_CAUTION: (240, 190, 20),
    LightState.FLASHING_CAUTION: (250, 220, 120), LightState.GO: (20, 160, 60), LightState.ARROW_GO: (20, 160, 60),
    LightState.UNKNOWN: (150, 150, 150),
}  # fmt: skip
DASH_M = 3.0


class Canvas:
    """Local metres -> pixels: ``centre`` [2] in the middle, ``reach_m`` to each side, +x right, +y up."""

    def __init__(self, centre: NDArray[np.floating], reach_m: float, size: int) -> None:
        self.pixels, self.centre, self.reach_m = size * SUPERSAMPLE, np.asarray(centre, np.float64), reach_m
        self.scale = self.pixels / (2.0 * reach_m)
        self.image = Image.new("RGB", (self.pixels, self.pixels), GROUND)
        self.draw = ImageDraw.Draw(self.image)

    def at(self, points: NDArray[np.floating]) -> list[float]:
        """[n,2] m -> columns and rows, flat."""
        offset = (np.asarray(points, np.float64) - self.centre) * self.scale
        return np.column_stack([self.pixels / 2 + offset[:, 0], self.pixels / 2 - offset[:, 1]]).ravel().tolist()

    def sees(self, points: NDArray[np.floating]) -> bool:
        low, high = points.min(axis=0), points.max(axis=0)
        return bool((high > self.centre - self.reach_m).all() and (low < self.centre + self.reach_m).all())

    def width(self, metres: float) -> int:
        return max(round(metres * self.scale), SUPERSAMPLE)

    def line(self, points: NDArray[np.floating], colour: tuple[int, int, int], metres: float) -> None:
        if len(points) > 1:
            self.draw.line(self.at(points), fill=colour, width=self.width(metres), joint="curve")

    def dot(self, point: NDArray[np.floating], colour: tuple[int, int, int], metres: float) -> None:
        (x, y), r = self.at(np.asarray(point)[None]), metres * self.scale
        self.draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)

    def result(self) -> NDArray[np.uint8]:
        size = self.pixels // SUPERSAMPLE
        return np.asarray(self.image.resize((size, size), Image.Resampling.LANCZOS))


def birds_eye(
    scene: TrafficScene, step: int | None = None, *, reach_m: float = 60.0, size: int = 900
) -> NDArray[np.uint8]:
    """[size,size,3] the scene at a step (default: now) around its ego, or where the ego was last seen before."""
    step = scene.now if step is None else step
    if not 0 <= step < scene.num_steps:
        raise DataError(f"scene {scene.id} has no step {step}; it has {scene.num_steps}")
    seen = np.flatnonzero(scene.valid[scene.ego])
    centre = scene.pose[scene.ego, seen[np.abs(seen - step).argmin()], :2]
    canvas = Canvas(centre, reach_m, size)
    _draw_map(canvas, scene)
    for piece_stop, state in zip(scene.light_stop, scene.light_state[:, step]):
        if state in LIGHTS:
            canvas.dot(piece_stop, LIGHTS[LightState(state)], 0.9)
    _draw_agents(canvas, scene, step)
    return canvas.result()


def _draw_map(canvas: Canvas, scene: TrafficScene) -> None:
    def lines(*kinds: PieceKind):
        for row in scene.pieces(*kinds):
            points = scene.piece(row)
            if canvas.sees(points):
                yield row, np.concatenate([points, points[:1]]) if scene.piece_closed[row] else points

    for row, points in lines(*POLYGONS):
        if len(points) > 2:
            canvas.draw.polygon(canvas.at(points), fill=AREAS[PieceKind(scene.piece_kind[row])])
    for row, points in lines(*LANES):
        on_route = scene.route is not None and scene.route[row]
        canvas.line(points, ROUTE if on_route else LANE, 0.5 if on_route else 0.25)
    for row, points in lines(*LINES):
        colour = YELLOW_PAINT if scene.piece_subtype[row] in YELLOW else WHITE_PAINT
        for piece in _dashes(points) if scene.piece_kind[row] == PieceKind.LINE_BROKEN else [points]:
            canvas.line(piece, colour, 0.15)
    for _, points in lines(PieceKind.ROAD_EDGE):
        canvas.line(points, EDGE, 0.3)
    for _, points in lines(PieceKind.STOP_LINE):
        canvas.line(points, STOP, 0.2)
    for _, points in lines(PieceKind.STOP_SIGN):
        canvas.dot(points[0], STOP, 0.7)


def _dashes(points: NDArray[np.float32]) -> list[NDArray[np.float64]]:
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    starts = np.arange(0.0, arc[-1], 2.0 * DASH_M)
    ends = np.minimum(starts + DASH_M, arc[-1])
    knots = np.stack([starts, ends], axis=1)
    return list(np.stack([np.interp(knots, arc, points[:, 0]), np.interp(knots, arc, points[:, 1])], axis=-1))


def _draw_agents(canvas: Canvas, scene: TrafficScene, step: int) -> None:
    corners = box_corners(scene)
    for n in np.flatnonzero(scene.valid[:, step]):
        colour = EGO if n == scene.ego else KINDS[AgentKind(scene.kind[n])]
        for steps, drawn in ((range(step), "past"), (range(step, scene.num_steps), "future")):
            at = [t for t in steps if scene.valid[n, t]]
            if drawn == "future":
                for run in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1):
                    canvas.line(scene.pose[n, run, :2], colour, 0.2)
            else:
                for t in at[::3]:
                    canvas.dot(scene.pose[n, t, :2], colour, 0.15)
        box = corners[n, step]
        pale = scene.role[n] & Role.STATIC and n != scene.ego
        fill = tuple((2 * 255 + c) // 3 for c in colour) if pale else colour
        edge = (0, 0, 0) if scene.role[n] & Role.PREDICT else colour
        canvas.draw.polygon(canvas.at(box), fill=fill, outline=edge, width=SUPERSAMPLE if pale else 2 * SUPERSAMPLE)
        nose = np.array([box[[0, 3]].mean(axis=0), box.mean(axis=0)])
        canvas.line(nose, (255, 255, 255), 0.2)


@job("traffic_picture")
def main(cfg: DictConfig) -> None:
    store = TrafficStore(cfg.scenes)
    scene = store.load(store.ids[0] if cfg.scene is None else str(cfg.scene))
    picture = birds_eye(scene, cfg.step, reach_m=cfg.reach_m, size=cfg.size)
    with atomic_stream(cfg.output) as stream:
        Image.fromarray(picture).save(stream, "PNG")
    logger.info("%s: scene %s at step %d", cfg.output, scene.id, scene.now if cfg.step is None else cfg.step)


if __name__ == "__main__":
    main()
