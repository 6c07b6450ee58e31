"""The promises of a TrafficScene, checked one by one; the first broken one is named with both values."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from navsim_ext.errors import DataError
from navsim_ext.scene import COMMANDS
from navsim_ext.traffic.codes import CODES, LANE_KINDS, AgentKind, EdgeKind, PieceKind, Role
from navsim_ext.traffic.motion import speed_known, unwrap_headings

if TYPE_CHECKING:
    from navsim_ext.traffic.scene import TrafficScene

FARTHEST_M = 20_000.0  # from the local origin; float32 still resolves 2 mm there
LARGEST_M = 100.0  # of a road user
FASTEST_MPS = 100.0


class BadScene(DataError):
    """A traffic scene that breaks its contract."""


def check(scene: TrafficScene) -> None:
    """Raises BadScene at the first broken promise: types, shapes, finiteness, ranges, identities, references."""
    checks = (_identity, _arrays, _agents, _poses, _map, _graph, _lights, _options)
    for one in checks:
        one(scene)


def _fail(scene: TrafficScene, text: str) -> NoReturn:
    raise BadScene(f"scene {scene.id!r} of {scene.source!r}: {text}")


def _identity(scene: TrafficScene) -> None:
    for name in ("id", "source", "licence", "map_location"):
        value = getattr(scene, name)
        if not isinstance(value, str):
            _fail(scene, f"{name} is {value!r}; text was expected")
    if not scene.id or "\n" in scene.id:
        _fail(scene, f"id {scene.id!r} must be a text of at least one character on one line")
    if not (isinstance(scene.dt, float) and 0.0 < scene.dt <= 10.0):
        _fail(scene, f"dt is {scene.dt!r}; a time step in (0, 10] s was expected")
    if not isinstance(scene.has_lights, bool):
        _fail(scene, f"has_lights is {scene.has_lights!r}; True or False was expected")


def _arrays(scene: TrafficScene) -> None:
    if not (isinstance(scene.pose, np.ndarray) and scene.pose.ndim == 3):
        _fail(scene, "pose is not an array of three dimensions [N,T,3]")
    n, t = scene.pose.shape[:2]
    if n == 0:
        _fail(scene, "no road users; the ego at least was expected")
    if t < 2:
        _fail(scene, f"{t} time step; at least 2 were expected, positions tell no speed otherwise")
    m, p = len(scene.piece_kind), len(scene.points)
    e, k = len(scene.edge_kind), len(scene.light_piece)
    f32, f64, u8, i32, i64, flag = np.float32, np.float64, np.uint8, np.int32, np.int64, np.bool_
    expected: dict[str, tuple[tuple[int, ...], Any]] = {
        "origin": ((3,), f64), "pose": ((n, t, 3), f32), "speed": ((n, t), f32), "valid": ((n, t), flag),
        "size": ((n, 3), f32), "kind": ((n,), u8), "role": ((n,), u8), "agent_id": ((n,), i64),
        "points": ((p, 2), f32), "piece_start": ((m + 1,), i32), "piece_kind": ((m,), u8),
        "piece_subtype": ((m,), u8), "piece_closed": ((m,), flag), "piece_id": ((m,), i64),
        "speed_limit": ((m,), f32), "edges": ((e, 2), i32), "edge_kind": ((e,), u8), "light_piece": ((k,), i32),
        "light_stop": ((k, 2), f64), "light_state": ((k, t), u8), "z": ((n, t), f32), "point_z": ((p,), f32),
        "source_heading": ((n, t), f32), "route": ((m,), flag), "goal": ((n, 2), f32), "command": ((t,), u8),
        "ego_dynamics": ((t, 4), f32),
    }  # fmt: skip
    for name, (shape, dtype) in expected.items():
        value = getattr(scene, name)
        if value is None and name in OPTIONAL:
            continue
        if not isinstance(value, np.ndarray) or value.dtype != dtype or value.shape != shape:
            found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            _fail(scene, f"{name} is {found}; {np.dtype(dtype)} {shape} was expected")
        if value.dtype.kind == "f" and name not in ("goal", "speed_limit") and not np.isfinite(value).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
            _fail(scene, f"{name}{list(at)} is {value[at]}; finite was expected")
        codes = CODES.get(name)
        if codes is not None and not np.isin(value, codes).all():
            bad = int(np.unique(value[~np.isin(value, codes)])[0])
            _fail(scene, f"{name} holds the code {bad}; one of {codes.tolist()} was expected")
    if not (isinstance(scene.now, int) and 0 <= scene.now < t):
        _fail(scene, f"now is {scene.now!r}; a step in [0, {t - 1}] was expected")


OPTIONAL = ("z", "point_z", "source_heading", "route", "goal", "command", "ego_dynamics")


def _agents(scene: TrafficScene) -> None:
    egos = np.flatnonzero(scene.role & Role.EGO)
    if len(egos) != 1:
        _fail(scene, f"{len(egos)} road users are the ego; exactly one was expected")
    if not scene.valid[egos[0], scene.now]:
        _fail(scene, f"the ego is not observed at the present step {scene.now}")
    if int(scene.role.max()) >= 2 * Role.STATIC:
        _fail(
            scene, f"role holds {int(scene.role.max())}; bits of {[f'{r.name}={r.value}' for r in Role]} were expected"
        )
    repeated = _repeated(scene.agent_id)
    if repeated is not None:
        _fail(scene, f"two road users have the id {repeated}")
    wrong = ~((scene.size > 0.0) & (scene.size <= LARGEST_M)).all(axis=1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        kind = AgentKind(int(scene.kind[row])).name.lower()
        _fail(
            scene,
            f"{kind} {scene.agent_id[row]} has the size {scene.size[row].tolist()} m; within (0, {LARGEST_M:.0f}] was "
            "expected",
        )
    never = ~scene.valid.any(axis=1)
    if never.any():
        _fail(scene, f"road user {scene.agent_id[np.flatnonzero(never)[0]]} is never observed; leave it out")


def _poses(scene: TrafficScene) -> None:
    for name in ("pose", "z", "source_heading"):
        value = getattr(scene, name)
        if value is not None and value[~scene.valid].any():
            _fail(scene, f"{name} is not 0 everywhere where valid is False")
    for name in ("pose", "points", "z", "point_z", "light_stop"):
        value = getattr(scene, name)
        reach = value[..., :2] if name == "pose" else value
        if value is not None and value.size and float(np.abs(reach).max()) > FARTHEST_M:
            _fail(scene, f"{name} reaches {float(np.abs(reach).max()):.0f} m from the local origin; at most "
                  f"{FARTHEST_M:.0f} m was expected (give the scene an origin near its ego)")  # fmt: skip
    if (scene.speed < 0.0).any() or scene.speed[~speed_known(scene.valid)].any():
        _fail(scene, "speed is negative, or not 0 where positions tell none")
    fastest = float(scene.speed.max())
    if fastest > FASTEST_MPS:
        row = int(np.unravel_index(scene.speed.argmax(), scene.speed.shape)[0])
        _fail(scene, f"road user {scene.agent_id[row]} moves at {fastest:.0f} m/s by its positions; at most "
              f"{FASTEST_MPS:.0f} m/s was expected (jumping track, or a wrong dt)")  # fmt: skip
    if not np.array_equal(unwrap_headings(scene.heading_as_recorded, scene.valid), scene.pose[..., 2]):
        _fail(scene, "headings of pose are not those of the source, unwrapped per track")


def _map(scene: TrafficScene) -> None:
    if not len(scene.piece_kind):
        _fail(scene, "no map: at least one piece was expected")
    starts = scene.piece_start
    if starts[0] != 0 or starts[-1] != len(scene.points) or (np.diff(starts) < 1).any():
        _fail(scene, f"piece_start must rise from 0 to the {len(scene.points)} points, with a point in every piece")
    repeated = _repeated(scene.piece_id)
    if repeated is not None:
        _fail(scene, f"two map pieces have the id {repeated}")
    limits = scene.speed_limit[np.isfinite(scene.speed_limit)]
    if np.isinf(scene.speed_limit).any() or ((limits <= 0.0) | (limits > FASTEST_MPS)).any():
        _fail(scene, f"a speed limit is not in (0, {FASTEST_MPS:.0f}] m/s; NaN says that it is not known")


def _graph(scene: TrafficScene) -> None:
    pieces = len(scene.piece_kind)
    if not len(scene.edges):
        return
    if scene.edges.min() < 0 or scene.edges.max() >= pieces:
        _fail(scene, f"the lane graph names piece {int(scene.edges.max())} or {int(scene.edges.min())} of {pieces}")
    lane = np.isin(scene.piece_kind, LANE_KINDS)
    stops = scene.edge_kind == EdgeKind.STOPS
    holder = np.isin(scene.piece_kind, [PieceKind.STOP_SIGN, PieceKind.STOP_LINE])
    fits = lane[scene.edges[:, 1]] & np.where(stops, holder[scene.edges[:, 0]], lane[scene.edges[:, 0]])
    if not fits.all():
        i, j = scene.edges[np.flatnonzero(~fits)[0]]
        _fail(scene, f"the lane graph joins piece {scene.piece_id[i]} and piece {scene.piece_id[j]}; two lanes, or a "
              "stop sign or line and a lane, were expected")  # fmt: skip
    triples = np.column_stack([scene.edges, scene.edge_kind])
    if len(np.unique(triples, axis=0)) != len(triples):
        _fail(scene, "the lane graph holds an edge twice")


def _lights(scene: TrafficScene) -> None:
    if len(scene.light_piece) and not scene.has_lights:
        _fail(scene, f"{len(scene.light_piece)} lights in a scene that is said to tell none (has_lights is False)")
    known = scene.light_piece[scene.light_piece != -1]
    if len(known) and (known.min() < 0 or known.max() >= len(scene.piece_kind)):
        _fail(scene, f"a light controls piece {int(known.max())} of {len(scene.piece_kind)}")
    if not np.isin(scene.piece_kind[known], LANE_KINDS).all():
        _fail(scene, "a light controls a map piece that is not a lane")
    repeated = _repeated(known)
    if repeated is not None:
        _fail(scene, f"two lights control the lane {scene.piece_id[repeated]}")


def _options(scene: TrafficScene) -> None:
    n, t, m = scene.num_agents, scene.num_steps, len(scene.piece_kind)
    for name, count in (("agent_tokens", n), ("agent_names", n), ("piece_tokens", m), ("frame_tokens", t)):
        tokens = getattr(scene, name)
        if not isinstance(tokens, tuple) or len(tokens) not in (0, count):
            _fail(scene, f"{name} has {len(tokens)} entries; none or {count} were expected")
        if name != "agent_names" and len(set(tokens)) != len(tokens):
            _fail(scene, f"{name} holds a token twice")
    for camera, paths in scene.images.items():
        if len(paths) != t:
            _fail(scene, f"camera {camera} has {len(paths)} pictures for {t} steps")
    if scene.goal is not None and np.isinf(scene.goal).any():
        _fail(scene, "a goal is infinite; NaN says that none is known")
    if scene.command is not None and int(scene.command.max()) >= len(COMMANDS):
        _fail(scene, f"command {int(scene.command.max())} does not exist; there are {COMMANDS}")
    if not isinstance(scene.rear_axle, float) or np.isinf(scene.rear_axle):
        _fail(scene, f"rear_axle is {scene.rear_axle!r}; metres, or NaN where not known, were expected")
    for name, array in scene.law.items():
        if not isinstance(array, np.ndarray):
            _fail(scene, f"law[{name!r}] is {type(array).__name__}; an array was expected")
    try:
        json.dumps([dict(scene.recipe), dict(scene.notes)], allow_nan=False)
    except (TypeError, ValueError) as error:
        _fail(scene, f"recipe and notes must be JSON: {error!s:.300}")


def _repeated(values: np.ndarray) -> int | None:
    """The first value that occurs twice."""
    unique, counts = np.unique(values, return_counts=True)
    return int(unique[counts > 1][0]) if (counts > 1).any() else None
