"""Road users and obstacles as small polyhedra inside their annotated boxes, and the order to paint them in.

A model is given once in fractions of its box (x forward, y left, z up, each -0.5 ... 0.5), so every drawn pixel of
an object lies inside the projection of its box. Faces that look away from the camera are not drawn.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from navsim_ext.scene import Annotations

Colour = tuple[int, int, int]

PALETTE: tuple[Colour, ...] = (
    (232, 232, 228), (58, 62, 70), (150, 154, 158), (160, 34, 36), (36, 70, 140),
    (196, 190, 178), (44, 98, 70), (214, 170, 60), (92, 64, 110), (70, 130, 160),
)  # fmt: skip
CLOTHES: tuple[Colour, ...] = (
    (196, 66, 52),
    (50, 96, 170),
    (230, 196, 70),
    (84, 140, 84),
    (226, 226, 226),
    (120, 70, 130),
)
COLOURS: dict[str, Colour] = {
    "glass": (40, 52, 64), "dark": (36, 36, 40), "wheel": (24, 24, 26), "hub": (120, 122, 126),
    "tail": (112, 20, 22), "brake": (255, 36, 24), "head": (246, 244, 220), "skin": (222, 180, 150),
    "orange": (240, 108, 24), "white": (240, 240, 240), "red": (200, 40, 36), "grey": (140, 140, 142),
    "lamp_red": (255, 40, 30), "lamp_green": (40, 240, 120), "lamp_off": (58, 54, 52), "steel": (92, 96, 100),
}  # fmt: skip
EMISSIVE = frozenset({"brake", "head", "lamp_red", "lamp_green"})  # lamps are not shaded
LONG_VEHICLE_M, HIGH_VEHICLE_M = 6.6, 2.4  # beyond either, a vehicle is drawn as a lorry or bus


@dataclass
class Model:
    """A shape in fractions of its box: vertices [V,3] and faces (vertex indices, colour key), inner to outer."""

    vertices: list[tuple[float, float, float]] = field(default_factory=list)
    faces: list[tuple[tuple[int, ...], str]] = field(default_factory=list)

    def prism(
        self, x: tuple, y: tuple, z: tuple, colours: dict[str, str], top_x: tuple | None = None, top_y=None
    ) -> Model:
        """Adds a box from (x0, y0, z0) to (x1, y1, z1) whose top may be smaller; ``colours`` by side name."""
        (x0, x1), (y0, y1), (tx0, tx1), (ty0, ty1) = x, y, top_x or x, top_y or y
        first = len(self.vertices)
        self.vertices += [(x1, y1, z[0]), (x0, y1, z[0]), (x0, y0, z[0]), (x1, y0, z[0])]
        self.vertices += [(tx1, ty1, z[1]), (tx0, ty1, z[1]), (tx0, ty0, z[1]), (tx1, ty0, z[1])]
        sides = {
            "left": (0, 1, 5, 4),
            "back": (1, 2, 6, 5),
            "right": (2, 3, 7, 6),
            "front": (3, 0, 4, 7),
            "top": (4, 5, 6, 7),
        }
        default = colours["all"]
        self.faces += [(tuple(first + k for k in ring), colours.get(side, default)) for side, ring in sides.items()]
        return self

    def patch(self, corners: Sequence[tuple[float, float, float]], colour: str) -> Model:
        """Adds one flat polygon, counter-clockwise as seen from outside."""
        first = len(self.vertices)
        self.vertices += list(corners)
        self.faces.append((tuple(range(first, first + len(corners))), colour))
        return self

    def on_back(self, y0: float, y1: float, z0: float, z1: float, colour: str) -> Model:
        return self.patch([(-0.5, y1, z0), (-0.5, y0, z0), (-0.5, y0, z1), (-0.5, y1, z1)], colour)

    def on_front(self, y0: float, y1: float, z0: float, z1: float, colour: str) -> Model:
        return self.patch([(0.5, y0, z0), (0.5, y1, z0), (0.5, y1, z1), (0.5, y0, z1)], colour)

    def wheels(self, centres: Sequence[float], radius_x: float, radius_z: float, y: float = 0.5) -> Model:
        """Adds discs on both sides, touching the ground, at the given x."""
        angle = np.arange(8) * np.pi / 4 + np.pi / 8
        for x in centres:
            for scale, colour in ((1.0, "wheel"), (0.5, "hub")):
                ring = [
                    (x + scale * radius_x * np.cos(a), np.sin(a) * scale * radius_z + radius_z - 0.5) for a in angle
                ]
                self.patch([(u, -y, w) for u, w in ring], colour)
                self.patch([(u, y, w) for u, w in reversed(ring)], colour)
        return self


@lru_cache(maxsize=1)
def models() -> dict[str, Model]:
    """The shapes by name."""
    car = Model().prism((-0.5, 0.5), (-0.5, 0.5), (-0.38, 0.06), {"all": "body"})
    car.wheels((-0.30, 0.31), 0.075, 0.19)
    for side in (-1, 1):
        inner, outer = sorted((0.26 * side, 0.47 * side))
        car.on_back(inner, outer, -0.10, 0.04, "tail").on_front(inner, outer, -0.12, 0.0, "head")
    car.on_back(-0.22, 0.22, -0.24, -0.10, "white")
    car.prism(
        (-0.42, 0.24),
        (-0.46, 0.46),
        (0.06, 0.46),
        {"all": "glass", "top": "body"},
        top_x=(-0.34, 0.10),
        top_y=(-0.36, 0.36),
    )
    car.prism((-0.34, 0.10), (-0.36, 0.36), (0.46, 0.5), {"all": "body"})

    lorry = Model().prism((-0.5, 0.5), (-0.5, 0.5), (-0.40, 0.5), {"all": "body"})
    lorry.wheels((-0.32, -0.18, 0.34), 0.05, 0.14)
    lorry.on_front(-0.44, 0.44, 0.02, 0.34, "glass").on_back(-0.44, 0.44, -0.22, 0.42, "grey")
    for side in (-1, 1):
        inner, outer = sorted((0.28 * side, 0.48 * side))
        lorry.on_back(inner, outer, -0.36, -0.25, "tail").on_front(inner, outer, -0.34, -0.24, "head")
        window = [
            (0.30, 0.5 * side, 0.02),
            (0.47, 0.5 * side, 0.02),
            (0.47, 0.5 * side, 0.34),
            (0.30, 0.5 * side, 0.34),
        ]
        lorry.patch(window if side < 0 else window[::-1], "glass")

    person = Model().prism((-0.28, 0.28), (-0.34, 0.34), (-0.5, -0.04), {"all": "dark"})
    person.prism((-0.38, 0.38), (-0.5, 0.5), (-0.04, 0.32), {"all": "cloth"}, top_x=(-0.3, 0.3), top_y=(-0.44, 0.44))
    person.prism((-0.24, 0.24), (-0.26, 0.26), (0.32, 0.5), {"all": "skin"})

    cyclist = Model().prism((-0.42, 0.42), (-0.07, 0.07), (-0.30, -0.12), {"all": "red"})
    cyclist.wheels((-0.30, 0.30), 0.19, 0.20, y=0.08)
    cyclist.prism((-0.22, 0.10), (-0.36, 0.36), (-0.14, 0.02), {"all": "dark"})
    cyclist.prism((-0.20, 0.08), (-0.5, 0.5), (0.02, 0.34), {"all": "cloth"}, top_x=(-0.08, 0.14), top_y=(-0.44, 0.44))
    cyclist.prism((-0.04, 0.12), (-0.26, 0.26), (0.34, 0.5), {"all": "white"})

    cone = Model().prism((-0.5, 0.5), (-0.5, 0.5), (-0.5, -0.42), {"all": "dark"})
    for low, high, colour in ((-0.42, -0.05, "orange"), (-0.05, 0.18, "white"), (0.18, 0.5, "orange")):
        a, b = (0.42 * (0.55 - z) / 0.97 for z in (low, high))
        cone.prism((-a, a), (-a, a), (low, high), {"all": colour}, top_x=(-b, b), top_y=(-b, b))

    barrier = Model()
    for k, edge in enumerate(np.linspace(-0.5, 0.5, 6)[:-1]):
        barrier.prism((-0.5, 0.5), (edge, edge + 0.2), (-0.5, 0.5), {"all": "red" if k % 2 == 0 else "white"})

    sign = Model().prism((-0.5, 0.5), (-0.08, 0.08), (-0.5, 0.0), {"all": "grey"})
    sign.prism((-0.5, 0.5), (-0.5, 0.5), (0.0, 0.5), {"all": "orange"})
    block = Model().prism((-0.5, 0.5), (-0.5, 0.5), (-0.5, 0.5), {"all": "grey"})
    return {
        "car": car, "lorry": lorry, "pedestrian": person, "bicycle": cyclist, "traffic_cone": cone,
        "barrier": barrier, "czone_sign": sign, "generic_object": block,
    }  # fmt: skip


def model_name(kind: str, box: NDArray[np.floating]) -> str:
    """Shape for an object of ``kind`` (OBJECT_TYPES) with box [7]."""
    if kind != "vehicle":
        return kind
    return "lorry" if box[3] > LONG_VEHICLE_M or box[5] > HIGH_VEHICLE_M else "car"


def colour_of(key: str, track_token: str, braking: bool) -> Colour:
    """RGB of a face; paint and clothes follow the track token, so an object keeps its colour over time."""
    if key in ("body", "cloth"):
        choices = PALETTE if key == "body" else CLOTHES
        return choices[zlib.crc32(track_token.encode()) % len(choices)]
    return COLOURS["brake" if key == "tail" and braking else key]


def braking_tracks(
    frames: Sequence[Annotations], now: int, interval_s: float, threshold_mps2: float = 0.6
) -> frozenset[str]:
    """Tracks whose brake lights are on at frame ``now`` of a window of annotations.

    On when the speed fell by more than ``threshold_mps2`` over the last interval, or when a vehicle stands
    (< 0.3 m/s) that moved (> 1 m/s) at some time in the window: a queue has its foot on the brake, a parked car not.
    """
    speeds: dict[str, dict[int, float]] = {}
    for index, objects in enumerate(frames):
        speed = np.hypot(objects.velocities[:, 0], objects.velocities[:, 1])
        for token, name, value in zip(objects.track_tokens, objects.names, speed.tolist()):
            if name == "vehicle":
                speeds.setdefault(token, {})[index] = value
    braking = set()
    for token, track in speeds.items():
        if now not in track:
            continue
        slowing = now - 1 in track and (track[now - 1] - track[now]) / interval_s > threshold_mps2
        if slowing or (track[now] < 0.3 and max(track.values()) > 1.0):
            braking.add(token)
    return frozenset(braking)


def paint_order(footprints: NDArray[np.float64], eye: NDArray[np.float64]) -> list[int]:
    """Far to near order of upright prisms with disjoint convex footprints [N,4,2], seen from ``eye`` [2].

    If a line separates two footprints and the eye lies on the side of A, B cannot hide A: A is painted after B
    (Newell's priority test in the plane). Lines tried: the edges of both. Overlapping footprints and cycles fall
    back on the distance of the centre.
    """
    count = len(footprints)
    distance = np.linalg.norm(footprints.mean(axis=1) - eye, axis=1)
    by_distance = np.argsort(-distance, kind="stable").tolist()
    if count < 2:
        return by_distance
    edge = np.roll(footprints, -1, axis=1) - footprints
    normal = np.stack([edge[..., 1], -edge[..., 0]], axis=-1)  # [N,4,2]
    offset = (normal * footprints).sum(-1)  # [N,4]
    centre_side = np.sign((normal * footprints.mean(axis=1)[:, None]).sum(-1) - offset)  # inside of the owner
    # side of every corner of every prism against every edge: [N edges' owner, 4 edges, N others, 4 corners]
    side = np.einsum("iek,jck->iejc", normal, footprints) - offset[:, :, None, None]
    beyond = (side * centre_side[:, :, None, None] <= 1e-9).all(axis=-1)  # [i,e,j]: j wholly outside of edge e of i
    eye_outside = (normal @ eye - offset) * centre_side < 0.0  # [i,e]
    other_in_front = (beyond & eye_outside[:, :, None]).any(axis=1)  # [i,j]: j is on the eye's side, i is not
    owner_in_front = (beyond & ~eye_outside[:, :, None]).any(axis=1)  # [i,j]: i is on the eye's side
    nearer = (owner_in_front | other_in_front.T) & ~(other_in_front | owner_in_front.T)  # [i,j]: i painted after j
    waiting_for = nearer.sum(axis=1)  # number of prisms that must be painted before i
    order: list[int] = []
    remaining = by_distance
    while remaining:
        chosen = next((i for i in remaining if waiting_for[i] == 0), remaining[0])
        order.append(chosen)
        remaining.remove(chosen)
        waiting_for -= nearer[:, chosen]
    return order
