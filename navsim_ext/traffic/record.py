"""TrafficScene <-> record of a shard: without loss, compressed, fast to load.

A record has two arrays: ``header`` (JSON, UTF-8) and ``content`` (one zstd frame of all arrays one after another). What
follows from the rest (speeds, unwrapped headings, zeros where nothing was observed) is not stored but derived again.
Before zstd, values are turned into what compresses: a float's bits are read as an integer, the differences of order
0, 1 or 2 between neighbours in a track or line are taken (modulo 2^32 or 2^64), their sign is folded into the lowest
bit, and the bytes are sorted by significance. All of it is exactly invertible.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.pdm.compiled import kernel
from navsim_ext.scene import Camera
from navsim_ext.traffic.motion import speeds, unwrap_headings
from navsim_ext.traffic.scene import TrafficScene

VERSION = 1
LEVEL = 6  # of zstd
TRACKS = ("xy", "heading", "z")  # [N,T,...]: only what was observed is stored
LINES = ("points", "point_z", "light_stop", "law.path_pose", "law.path_speed")  # second differences
STEADY = ("piece_start", "edges", "piece_id", "agent_id", "ego_dynamics")  # first differences
ARRAYS = (
    "origin size kind role agent_id points piece_start piece_kind piece_subtype piece_closed piece_id speed_limit "
    "edges edge_kind light_piece light_stop light_state"
).split()
OPTIONAL = ("point_z", "route", "goal", "command", "ego_dynamics")
TEXTS = ("id", "source", "licence", "map_location")
LISTS = ("agent_tokens", "agent_names", "piece_tokens", "frame_tokens")


def encode(scene: TrafficScene) -> dict[str, NDArray]:
    """The arrays of a scene's record; equal scenes give equal bytes."""
    valid = scene.valid
    parts: dict[str, NDArray] = {"valid": np.packbits(valid), "xy": scene.pose[..., :2][valid]}
    parts["heading"] = scene.heading_as_recorded[valid]
    if scene.z is not None:
        parts["z"] = scene.z[valid]
    parts |= {name: getattr(scene, name) for name in ARRAYS}
    parts |= {name: getattr(scene, name) for name in OPTIONAL if getattr(scene, name) is not None}
    parts |= {f"law.{name}": np.asarray(array) for name, array in sorted(scene.law.items())}
    table, blobs = [], []
    for name, array in parts.items():
        order = 1 if name in (*TRACKS, *STEADY) else 2 if name in LINES else 0
        table.append([name, array.dtype.str, list(array.shape), order])
        blobs.append(_pack(array, order))
    header = {
        "version": VERSION,
        **{name: getattr(scene, name) for name in TEXTS},
        **{name: list(getattr(scene, name)) for name in LISTS},
        "dt": scene.dt,
        "now": scene.now,
        "steps": scene.num_steps,
        "has_lights": scene.has_lights,
        "rear_axle": None if math.isnan(scene.rear_axle) else scene.rear_axle,
        "cameras": {name: _camera_to_json(camera) for name, camera in scene.cameras.items()},
        "images": {name: list(paths) for name, paths in scene.images.items()},
        "recipe": dict(scene.recipe),
        "notes": dict(scene.notes),
        "arrays": table,
    }
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    content = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False).compress(b"".join(blobs))
    return {"header": np.frombuffer(text, np.uint8), "content": np.frombuffer(content, np.uint8)}


def decode(arrays: Mapping[str, NDArray], where: str) -> TrafficScene:
    """The scene of a record; raises DataError naming ``where`` for a record of another version or a damaged one.

    The scene is not validated again: it was before it was stored, and the store's checksum guards the bytes.
    """
    try:
        header = json.loads(arrays["header"].tobytes())
        if header["version"] != VERSION:
            raise DataError(
                f"{where}: record of version {header['version']}, this program reads {VERSION}: build it again"
            )
        parts = _unpack_all(header["arrays"], arrays["content"])
        return _scene(header, parts)
    except (KeyError, ValueError, RecursionError, TypeError, zstandard.ZstdError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: not a record of a traffic scene ({type(error).__name__} {error!s:.300})") from error


def _scene(header: Mapping[str, Any], parts: dict[str, NDArray]) -> TrafficScene:
    count, steps = len(parts["kind"]), header["steps"]
    valid = np.unpackbits(parts["valid"], count=count * steps).view(np.bool_).reshape(count, steps)
    heading = _spread(parts["heading"], valid)
    unwrapped = unwrap_headings(heading, valid)
    pose = np.empty((count, steps, 3), np.float32)
    pose[..., :2] = _spread(parts["xy"], valid)
    pose[..., 2] = unwrapped
    return TrafficScene(
        **{name: header[name] for name in TEXTS},
        **{name: tuple(header.get(name, ())) for name in LISTS},
        dt=header["dt"],
        now=header["now"],
        pose=pose,
        speed=speeds(pose[..., :2], valid, header["dt"]),
        valid=valid,
        has_lights=header["has_lights"],
        **{name: parts[name] for name in ARRAYS},
        **{name: parts.get(name) for name in OPTIONAL},
        z=_spread(parts["z"], valid) if "z" in parts else None,
        source_heading=None if np.array_equal(heading, unwrapped) else heading,
        rear_axle=float("nan") if header["rear_axle"] is None else header["rear_axle"],
        cameras={name: _camera_from_json(camera) for name, camera in header["cameras"].items()},
        images={name: tuple(paths) for name, paths in header["images"].items()},
        law={name.removeprefix("law."): array for name, array in parts.items() if name.startswith("law.")},
        recipe=header["recipe"],
        notes=header["notes"],
    )


def _spread(values: NDArray, valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[N,T,...] with ``values`` [n,...] where valid and 0 elsewhere."""
    whole = np.zeros((*valid.shape, *values.shape[1:]), np.float32)
    if len(values) != np.count_nonzero(valid):
        raise ValueError(f"{len(values)} values for {np.count_nonzero(valid)} observations")
    _scatter(values.reshape(len(values), -1), valid.reshape(-1), whole.reshape(valid.size, -1))
    return whole


def _pack(array: NDArray, order: int) -> bytes:
    columns = np.ascontiguousarray(array.T) if array.ndim == 2 and array.shape[1] <= 4 else np.ascontiguousarray(array)
    if columns.dtype.itemsize < 4 or not columns.size:
        return columns.tobytes()
    bits = columns.reshape(-1).view(np.int32 if columns.dtype.itemsize == 4 else np.int64)
    for _ in range(order):
        bits = np.diff(bits, prepend=bits.dtype.type(0))
    folded = (bits << 1) ^ (bits >> (8 * bits.itemsize - 1)) if order else bits
    return np.ascontiguousarray(folded.view(np.uint8).reshape(-1, bits.itemsize).T).tobytes()


def _unpack_all(table: list[Any], content: NDArray[np.uint8]) -> dict[str, NDArray]:
    whole = np.frombuffer(zstandard.ZstdDecompressor().decompress(content), np.uint8)
    parts, position = {}, 0
    for name, dtype_text, shape, order in table:
        dtype = np.dtype(dtype_text)
        size = math.prod(shape)
        turned = len(shape) == 2 and shape[1] <= 4
        planes = whole[position : position + size * dtype.itemsize]
        position += size * dtype.itemsize
        if dtype.itemsize < 4 or not size:
            columns = planes.view(dtype)
        else:
            bits = np.empty((shape[0], shape[1]) if turned else (size, 1), f"u{dtype.itemsize}")
            _restore(planes.reshape(dtype.itemsize, size), order, bits)
            parts[name] = bits.view(dtype).reshape(shape)
            continue
        parts[name] = np.ascontiguousarray(columns.reshape(shape[::-1]).T) if turned else columns.reshape(shape)
    if position != len(whole):
        raise ValueError(f"{len(whole)} bytes of content, {position} by its header")
    return parts


@kernel
def _restore(planes, order, out):
    """Inverse of :func:`_pack` into unsigned ``out`` [n,k], column after column: bytes by significance -> folded
    differences -> values; arithmetic wraps around."""
    zero, one = out.dtype.type(0), out.dtype.type(1)
    step, value = zero, zero
    wide = planes.shape[0] == 8
    i = 0
    for column in range(out.shape[1]):
        for row in range(out.shape[0]):
            low = (
                np.uint32(planes[0, i])
                | np.uint32(planes[1, i]) << np.uint32(8)
                | np.uint32(planes[2, i]) << np.uint32(16)
                | np.uint32(planes[3, i]) << np.uint32(24)
            )
            folded = out.dtype.type(low)
            if wide:
                for plane in range(4, 8):
                    folded |= out.dtype.type(planes[plane, i]) << out.dtype.type(8 * plane)
            i += 1
            if order == 0:
                out[row, column] = folded
                continue
            change = (folded >> one) ^ (zero - (folded & one))
            if order == 1:
                value += change
            else:
                step += change
                value += step
            out[row, column] = value


@kernel
def _scatter(values, valid, out):
    """Rows of ``values`` one after another into the rows of ``out`` where ``valid``."""
    at = 0
    for row in range(len(valid)):
        if valid[row]:
            for column in range(values.shape[1]):
                out[row, column] = values[at, column]
            at += 1


def _camera_to_json(camera: Camera) -> dict[str, Any]:
    return {
        name: value if isinstance(value, str) else np.asarray(value, np.float64).tolist()
        for name, value in vars(camera).items()
    }


def _camera_from_json(content: Mapping[str, Any]) -> Camera:
    return Camera(**{name: value if isinstance(value, str) else np.array(value) for name, value in content.items()})
