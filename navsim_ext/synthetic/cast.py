"""The cast of a log: road users collected one by one, then packed into the arrays that the simulation takes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from navsim_ext.synthetic import roads
from navsim_ext.synthetic.paths import Path, follow, polyline, random_route, straight
from navsim_ext.synthetic.town import PARKING_WIDTH, Town
from navsim_ext.synthetic.traffic import BICYCLE, PEDESTRIAN, STATIC, VEHICLE, Population, Signals

EGO_SIZE = (5.176, 2.297, 1.777)  # nuPlan's Pacifica: length, width, height [m]
EGO_AXLE_TO_CENTRE = 1.461  # m
NO_EVENT = (1e9, 1e9, 0.0, 0.0)
CAR_SIZES = ((4.2, 1.8, 1.5), (4.7, 1.9, 1.5), (5.0, 2.0, 1.8), (5.4, 2.0, 1.9), (7.5, 2.4, 3.0))
CAR_SHARES = (0.27, 0.38, 0.2, 0.1, 0.05)
STATIC_SIZES = {
    "traffic_cone": (0.4, 0.4, 0.8),
    "barrier": (2.0, 0.5, 1.0),
    "czone_sign": (0.7, 0.3, 1.4),
    "generic_object": (0.8, 0.7, 1.0),
}


@dataclass
class Cast:
    """Road users of one log in a town; the ego comes first."""

    town: Town
    random: np.random.Generator
    signals: Signals
    paths: list[Path | None] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    principals: int = 0  # members that the situation needs; those after them are there by chance

    def __len__(self) -> int:
        return len(self.names)

    def add_ego(self, path: Path, start: float, speed: float) -> None:
        self._add(
            "vehicle", path, kind=VEHICLE, start=start, speed=speed, size=EGO_SIZE, axle=EGO_AXLE_TO_CENTRE,
            headway=1.1, acceleration=2.0, braking=2.2, standstill=2.2, jerk=3.0,
        )  # fmt: skip

    def add_car(
        self,
        path: Path,
        start: float,
        speed: float,
        *,
        size: tuple[float, float, float] | None = None,
        eagerness: float | None = None,
        event: tuple[float, float, float, float] = NO_EVENT,
    ) -> int:
        """A driven car with its rear axle at ``start``; ``event`` = (from s, to s, down to m/s, braking m/s^2)."""
        size = size or CAR_SIZES[int(self.random.choice(len(CAR_SIZES), p=CAR_SHARES))]
        return self._add(
            "vehicle", path, kind=VEHICLE, start=start, speed=speed, size=size, axle=0.27 * size[0],
            eagerness=eagerness or float(self.random.uniform(0.85, 1.02)), headway=float(self.random.uniform(0.9, 1.4)),
            acceleration=float(self.random.uniform(1.3, 2.0)), braking=2.4, jerk=8.0, event=event,
        )  # fmt: skip

    def add_cyclist(self, path: Path, start: float, speed: float) -> int:
        return self._add(
            "bicycle", path, kind=BICYCLE, start=start, speed=speed, size=(1.8, 0.7, 1.7), axle=0.5,
            eagerness=speed / float(path.speed.max()), headway=1.0, acceleration=0.8, jerk=4.0,
        )  # fmt: skip

    def add_pedestrian(self, path: Path, start: float = 0.0, depart: float = 0.0, kerb: float = -1.0) -> int:
        speed = float(path.speed[0]) if depart <= 0.0 else 0.0
        return self._add(
            "pedestrian", path, kind=PEDESTRIAN, start=start, speed=speed, size=(0.7, 0.7, 1.75), axle=0.0, jerk=50.0,
            depart=depart, kerb=kerb,
        )  # fmt: skip

    def add_static(self, name: str, pose: NDArray, size: tuple[float, float, float]) -> int:
        return self._add(name, None, kind=STATIC, size=size, axle=0.0, pose=tuple(pose))

    def add_crossing_pedestrian(self, ends: NDArray, reaches_kerb_at: float) -> int:
        """Walks over a crosswalk from ends[0] to ends[1], arriving at the kerb at a given time [s]."""
        speed = float(self.random.uniform(1.2, 1.7))
        along = (ends[1] - ends[0]) / np.hypot(*(ends[1] - ends[0]))
        approach = 2.5 + max(reaches_kerb_at, 0.0) * speed
        approach, depart = (approach, 0.0) if approach < 9.0 else (9.0, reaches_kerb_at - (9.0 - 2.5) / speed)
        path = straight(ends[0] - approach * along, ends[1] + 4.0 * along, speed)
        return self.add_pedestrian(path, depart=depart, kerb=approach - 0.3)

    def _add(self, name: str, path: Path | None, **row) -> int:
        self.names.append(name)
        self.paths.append(path)
        self.rows.append(row)
        return len(self.names) - 1

    def position(self, index: int) -> NDArray[np.float64]:
        """[2] where a member starts."""
        path, row = self.paths[index], self.rows[index]
        if path is None:
            return np.array(row["pose"][:2])
        return path.xy[min(int(row["start"] / 0.5), len(path.xy) - 1)]

    def pack(self) -> Population:
        """Arrays for the simulation."""
        defaults = {
            "start": 0.0, "speed": 0.0, "eagerness": 1.0, "headway": 1.2, "acceleration": 1.5, "braking": 2.4,
            "standstill": 2.0, "jerk": 8.0, "depart": 0.0, "kerb": -1.0, "event": NO_EVENT, "pose": (0.0, 0.0, 0.0),
        }  # fmt: skip

        def column(name: str, dtype=np.float64) -> NDArray:
            return np.array([row.get(name, defaults.get(name)) for row in self.rows], dtype=dtype)

        return Population(
            kind=column("kind", np.int64),
            axle_to_centre=column("axle"),
            size=column("size"),
            **{name: column(name) for name in defaults},
        )

    def add_background(self, around: NDArray, radius: float, ego_lanes: set[int], density: float, drive: float) -> None:
        """Cars on the lanes within ``radius`` of a place, routes at random; the ego's own lanes stay as they are."""
        for lane in self.town.lanes:
            if lane.index in ego_lanes or np.hypot(*(lane.baseline - around).T).min() > radius:
                continue
            length = float(roads.arc_lengths(lane.baseline)[-1])
            at = float(self.random.exponential(1.0 / density))
            while at < length - 4.0:
                point = lane.baseline[min(int(at), len(lane.baseline) - 1)]
                if np.hypot(*(point - around)) < radius:
                    self._add_background_car(lane.index, at, length, drive)
                at += 11.0 + float(self.random.exponential(1.0 / density))

    def _add_background_car(self, lane: int, at: float, length: float, drive: float) -> None:
        route = random_route(self.town, self.random, lane, max(drive - (length - at), 1.0))
        if self.random.random() < 0.07:
            path = follow(self.town, lane, route, lateral_offset=-1.0)
            self.add_cyclist(path, at, float(self.random.uniform(3.5, 5.0)))
            return
        path = follow(self.town, lane, route)
        limit = float(path.speed[min(int(at / 0.5), len(path.speed) - 1)])
        stop = max(path.crossings[0].start - at - 6.0, 0.0)
        speed = min(limit * float(self.random.uniform(0.75, 1.0)), np.sqrt(2.0 * 1.8 * stop))
        self.add_car(path, at, speed)

    def add_parked(self, track: NDArray, radius: float) -> None:
        """Cars in the parking strips and lots, and street furniture, within ``radius`` of the ego's track."""
        for _road, _forward, ring in self.town.parking:
            half = len(ring) // 2
            inner, outer = ring[:half], ring[half:][::-1]
            middle = 0.5 * (inner + outer)
            if np.hypot(*(middle[:, None] - track[None]).transpose(2, 0, 1)).min() > radius:
                continue
            self._fill_strip(middle, track, radius)
        for lot in self.town.lots:
            corner = lot[0]
            if np.hypot(*(corner - track).T).min() > radius:
                continue
            half = len(lot) // 2
            along = (lot[half - 1] - lot[0]) / np.hypot(*(lot[half - 1] - lot[0]))
            inward = (lot[-1] - lot[0]) / np.hypot(*(lot[-1] - lot[0]))
            heading = float(np.arctan2(inward[1], inward[0]))
            for slot in range(7):
                if self.random.random() < 0.5:
                    place = corner + (2.6 + 3.2 * slot) * along + 4.0 * inward
                    self.add_static("vehicle", np.append(place, heading), CAR_SIZES[slot % 4])

    def _fill_strip(self, middle: NDArray, track: NDArray, radius: float) -> None:
        length = float(roads.arc_lengths(middle)[-1])
        heading = roads.headings(middle)
        at = 4.0
        works = self.random.random() < 0.15  # a stretch with cones instead of cars
        while at < length - 4.0:
            index = min(int(round(at / length * (len(middle) - 1))), len(middle) - 1)
            near = np.hypot(*(middle[index] - track).T).min() < radius
            if near and works and self.random.random() < 0.8:
                name = str(self.random.choice(list(STATIC_SIZES), p=(0.6, 0.2, 0.1, 0.1)))
                self.add_static(name, np.append(middle[index], heading[index]), STATIC_SIZES[name])
            elif near and not works and self.random.random() < 0.55:
                size = CAR_SIZES[int(self.random.integers(0, 4))]
                shift = float(self.random.uniform(-0.12, 0.12)) - 0.5 * (PARKING_WIDTH - size[1]) * 0.3
                normal = roads.unit(heading[index] + np.pi / 2)
                turned = heading[index] + float(self.random.normal(0.0, 0.02))
                self.add_static("vehicle", np.append(middle[index] + shift * normal, turned), size)
            at += 3.5 if works else 6.6

    def add_walkers(self, track: NDArray, radius: float, count: int) -> None:
        """Pedestrians strolling along the walkways."""
        near = [
            ring
            for ring in self.town.walkways
            if np.hypot(*(ring[:, None] - track[None, ::20]).transpose(2, 0, 1)).min() < radius
        ]
        for _ in range(count if near else 0):
            ring = near[int(self.random.integers(len(near)))]
            half = len(ring) // 2
            share = float(self.random.uniform(0.25, 0.75))
            line = share * ring[:half] + (1 - share) * ring[half:][::-1]
            line = roads.resample(line if self.random.random() < 0.5 else line[::-1], 0.5)
            start = float(self.random.uniform(0.0, max(0.5 * len(line) - 20.0, 1.0)))
            self.add_pedestrian(polyline(line, float(self.random.uniform(0.9, 1.6))), start=start)
