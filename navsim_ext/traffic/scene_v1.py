"""Reader of the neutral npz ``scene.v1``: one file per scene, plain arrays, nothing pickled.

Arrays of a file: ``meta`` (JSON text: schema, source, id, licence, dt, cur, origin) · ``a_xy`` [N,T,2], ``a_yaw``,
``a_z`` [N,T], ``a_ok`` [N,T], ``a_size`` [N,3], ``a_type``, ``a_id``, ``a_role`` [N] · ``p_xy`` [P,2], ``p_ptr`` [M+1],
``p_type``, ``p_closed`` [M] · ``l_poly`` [K], ``l_xy`` [K,2], ``l_state`` [K,T] · ``e_ij`` [E,2], ``e_type`` [E].
Read if there: ``p_z`` [P], ``p_id``, ``p_lane`` [M], ``l_raw`` [K,T], ``p_route`` [M], ``goal`` [N,2], ``ego_cmd`` [T],
``ego_dyn`` [T,4]. ``a_vel`` is not read: speeds come from positions.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext import files
from navsim_ext.errors import DataError, MissingError
from navsim_ext.traffic.codes import LaneType, LightState, PieceKind
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.source import FileSource, Reading, reading

SCHEMA = "scene.v1"
REQUIRED = (
    "meta a_xy a_yaw a_z a_ok a_size a_type a_id a_role p_xy p_ptr p_type p_closed l_poly l_xy l_state e_ij e_type"
).split()
STATE_OF = {
    0: LightState.UNKNOWN,
    1: LightState.STOP,
    2: LightState.CAUTION,
    3: LightState.GO,
    255: LightState.NOT_REPORTED,
}


def read_scene(path: str | Path) -> TrafficScene:
    """The scene of one file; raises DataError naming file and field for anything that does not fit the format."""
    path = Path(path)
    arrays = _load(path)
    try:
        meta = json.loads(str(arrays["meta"]))
        if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
            raise DataError(
                f"meta names the schema {meta.get('schema') if isinstance(meta, dict) else meta!r}, not {SCHEMA}"
            )
        return _scene(meta, arrays)
    except DataError as error:
        raise type(error)(f"{path}: {error}") from error
    except (KeyError, ValueError, RecursionError, TypeError, IndexError) as error:
        raise DataError(f"{path}: not a file of schema {SCHEMA}: {type(error).__name__} {error!s:.300}") from error


class NeutralNpz(FileSource):
    """All npz files of scenes below ``root``; the unit of work is a file."""

    suffixes = (".npz",)
    described = f"{SCHEMA} npz files"

    def holds(self, path: Path) -> bool:
        return super().holds(path) and _holds_scene(path)

    def read(self, unit: str) -> Iterator[Reading]:
        path = self.path_of(unit)
        yield reading(str(path), lambda: read_scene(path))


def scene_files(root: str | Path) -> list[Path]:
    """The npz files below a folder that hold scenes, sorted; raises MissingError for none."""
    return NeutralNpz(root).files()


def read_scenes(root: str | Path) -> Iterator[TrafficScene]:
    """All scenes of a folder, in the order of their file names."""
    for path in scene_files(root):
        yield read_scene(path)


def _holds_scene(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return "a_xy.npy" in archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError):
        return True  # not dropped in silence: reading it names what is wrong


def _load(path: Path) -> dict[str, NDArray]:
    if not path.is_file():
        raise MissingError(f"{path} does not exist")
    with files.reading(path, "it is cut short, damaged or no npz: write it again", DataError):
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in REQUIRED if name not in archive.files]
            if missing:
                raise DataError(f"{path}: arrays {', '.join(missing)} are missing; schema {SCHEMA} was expected")
            return {name: archive[name] for name in archive.files}


def _scene(meta: dict[str, Any], arrays: dict[str, NDArray]) -> TrafficScene:
    kinds = arrays["p_type"].astype(np.uint8)
    pieces, points = len(kinds), len(arrays["p_xy"])
    subtype = np.zeros(pieces, np.uint8)
    subtype[kinds == PieceKind.LANE] = LaneType.SURFACE_STREET
    subtype[kinds == PieceKind.BIKE_LANE] = LaneType.BIKE
    if "p_lane" in arrays:
        lanes = np.isin(kinds, [PieceKind.LANE, PieceKind.BIKE_LANE])
        subtype = np.where(lanes, arrays["p_lane"], 0).astype(np.uint8)
    states = arrays["l_raw"] if "l_raw" in arrays else _states(arrays["l_state"])
    has_lights = bool(meta.get("dynamic_map_states", meta.get("lights") != "none in source"))
    origin = np.zeros(3)
    given = np.asarray(meta["origin"], np.float64)
    origin[: len(given)] = given
    optional: dict[str, Any] = {}
    for field, name, dtype in (
        ("point_z", "p_z", np.float32), ("route", "p_route", np.bool_), ("goal", "goal", np.float32),
        ("command", "ego_cmd", np.uint8), ("ego_dynamics", "ego_dyn", np.float32),
    ):  # fmt: skip
        if name in arrays:
            optional[field] = arrays[name].astype(dtype)
    return TrafficScene.make(
        id=str(meta["id"]),
        source=str(meta["source"]),
        licence=str(meta["licence"]),
        dt=float(meta["dt"]),
        now=int(meta["cur"]),
        origin=origin,
        xy=arrays["a_xy"],
        heading=arrays["a_yaw"],
        z=arrays["a_z"],
        valid=arrays["a_ok"],
        size=arrays["a_size"].astype(np.float32),
        kind=arrays["a_type"].astype(np.uint8),
        role=arrays["a_role"].astype(np.uint8),
        agent_id=arrays["a_id"].astype(np.int64),
        points=arrays["p_xy"].astype(np.float32),
        piece_start=arrays["p_ptr"].astype(np.int32),
        piece_kind=kinds,
        piece_subtype=subtype,
        piece_closed=arrays["p_closed"].astype(np.bool_),
        piece_id=arrays["p_id"].astype(np.int64) if "p_id" in arrays else np.arange(pieces, dtype=np.int64),
        speed_limit=np.full(pieces, np.nan, np.float32),
        edges=arrays["e_ij"].astype(np.int32).reshape(-1, 2),
        edge_kind=arrays["e_type"].astype(np.uint8),
        has_lights=has_lights,
        light_piece=arrays["l_poly"].astype(np.int32),
        light_stop=arrays["l_xy"].astype(np.float64).reshape(-1, 2),
        light_state=states.astype(np.uint8),
        map_location=str(meta.get("map_location", "")),
        notes={} if points else {"map without points": 1},
        **optional,
    )


def _states(coarse: NDArray) -> NDArray[np.uint8]:
    """LightState of the four coarse states; raises DataError for a code that does not exist."""
    table = np.zeros(256, np.uint8)
    for code, state in STATE_OF.items():
        table[code] = state
    unknown = sorted(set(np.unique(coarse).tolist()) - STATE_OF.keys())
    if unknown:
        raise DataError(f"l_state holds {unknown}; one of {sorted(STATE_OF)} was expected")
    return table[coarse]
