"""Traffic scenes for tests of the closed loop: a straight road, cars on it, a light, and whatever a test wants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from navsim_ext.traffic.codes import EdgeKind, LightState, PieceKind, Role
from navsim_ext.traffic.scene import TrafficScene

LANE = 3.5


@dataclass
class Car:
    """Constant acceleration along a heading; ``seen`` = (first, last) step observed."""

    x: float
    y: float
    heading: float = 0.0
    speed: float = 0.0
    acceleration: float = 0.0
    size: tuple[float, float, float] = (4.6, 1.9, 1.6)
    kind: int = 0
    seen: tuple[int, int] = (0, 10_000)


def road(
    cars: list[Car],
    *,
    steps: int = 91,
    now: int = 10,
    dt: float = 0.1,
    red: bool | None = None,
    areas: bool = False,
    move: tuple[float, float, float] = (0.0, 0.0, 0.0),
    goal: np.ndarray | None = None,
    id: str = "road",
    half_length: float = 200.0,
) -> TrafficScene:
    """A road along x of two lanes towards +x (y = -1.75, -5.25) and one towards -x (y = 1.75), edges at y = 3.5 and
    y = -7; a light over the lane y = -1.75 at x = 40. ``move`` turns and shifts all of it rigidly."""
    t = (np.arange(steps) - now) * dt
    xy, heading, valid = [], [], []
    for car in cars:
        s = car.speed * t + 0.5 * car.acceleration * t**2
        if car.acceleration < 0.0 and car.speed > 0.0:
            stop = car.speed / -car.acceleration
            s = np.where(t > stop, 0.5 * car.speed * stop, s)
        xy.append(np.stack([car.x + s * np.cos(car.heading), car.y + s * np.sin(car.heading)], -1))
        heading.append(np.full(steps, car.heading))
        valid.append((np.arange(steps) >= car.seen[0]) & (np.arange(steps) <= car.seen[1]))
    along = np.linspace(-half_length, half_length, 81)
    line = lambda y, back=False: np.stack([along[::-1] if back else along, np.full(81, y)], -1)  # noqa: E731
    pieces = [
        (PieceKind.LANE, line(-1.75)),
        (PieceKind.LANE, line(-5.25)),
        (PieceKind.LANE, line(1.75, True)),
        (PieceKind.ROAD_EDGE, line(-7.0)),
        (PieceKind.ROAD_EDGE, line(3.5, True)),
    ]
    if areas:
        ring = np.array([[-half_length, -7.0], [half_length, -7.0], [half_length, 3.5], [-half_length, 3.5]])
        pieces = [*pieces[:3], (PieceKind.DRIVABLE_AREA, ring)]
    cos, sin = np.cos(move[2]), np.sin(move[2])
    turn = np.array([[cos, sin], [-sin, cos]])
    moved = lambda points: np.asarray(points, float) @ turn + np.array(move[:2])  # noqa: E731
    count = len(pieces)
    role = np.zeros(len(cars), np.uint8)
    role[0] = Role.EGO
    lights = red is not None
    state = LightState.STOP if red else LightState.GO
    return TrafficScene.make(
        id=id, source="synthetic", licence="CC0", dt=dt, now=now, origin=np.zeros(3),
        xy=moved(np.stack(xy)), heading=np.stack(heading) + move[2], valid=np.stack(valid),
        size=np.array([car.size for car in cars], np.float32), kind=np.array([car.kind for car in cars], np.uint8),
        role=role, agent_id=np.arange(1, len(cars) + 1),
        points=np.concatenate([moved(points) for _, points in pieces]).astype(np.float32),
        piece_start=np.cumsum([0] + [len(points) for _, points in pieces]).astype(np.int32),
        piece_kind=np.array([kind for kind, _ in pieces], np.uint8), piece_subtype=np.zeros(count, np.uint8),
        piece_closed=np.array([kind == PieceKind.DRIVABLE_AREA for kind, _ in pieces]), piece_id=np.arange(count),
        speed_limit=np.full(count, np.nan, np.float32),
        edges=np.array([[0, 1]], np.int32), edge_kind=np.array([EdgeKind.RIGHT], np.uint8), has_lights=lights,
        light_piece=np.array([0] if lights else [], np.int32),
        light_stop=moved([[40.0, -1.75]] if lights else np.empty((0, 2))).reshape(-1, 2),
        light_state=np.full((1 if lights else 0, steps), int(state), np.uint8),
        goal=None if goal is None else moved(goal).astype(np.float32),
    )  # fmt: skip


def crowd(
    seed: int, count: int = 40, id: str = "crowd", move: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> TrafficScene:
    """Cars, cyclists and pedestrians at random places and headings, overlapping often, ego first."""
    random = np.random.default_rng(seed)
    cars = [
        Car(
            x=float(random.uniform(-30, 30)), y=float(random.uniform(-9, 6)), heading=float(random.uniform(-3, 3)),
            speed=float(random.uniform(0, 12)), kind=int(random.integers(0, 3)),
            size=tuple(random.uniform((0.6, 0.6, 1.5), (6.0, 2.4, 2.0))),
        )
        for _ in range(count)
    ]  # fmt: skip
    return road(cars, id=id, move=move, red=True)
