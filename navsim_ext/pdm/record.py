"""What scoring one scene needs: the record that the metric cache stores and the scorer reads.

Legend: n tracks, K = 11 frames at 2 Hz (0 ... 5 s; v2 uses the first 9), P map polygons in range, r red connectors,
C vertices of the centreline, V versions in the order of ``VERSIONS``. Poses are global (UTM metres, radians,
float64), velocities global m/s.

Both scorer versions share one record. A track is stored at the 2 Hz frames it was seen in, not at 10 Hz: the v1 and
the v2 observation, including the rule that a track seen once stands at every step, follow from it exactly (see
:mod:`navsim_ext.pdm.log_replay`). Map polygons are stored once per map (:class:`PolygonTable`); a scene has indices.

A record that was imported from the cache of one NAVSIM version only has no PDM-Closed of the other: that row of
``pdm_closed``, ``pdm_progress`` and ``pdm_multiplier`` is NaN, and the scene has no scores of that version.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError, TriviumError
from navsim_ext.pdm.traffic_agents import TrafficAgents
from navsim_ext.pdm.version import VERSIONS

NUM_FRAMES = 11  # 2 Hz frames 0 ... 5 s
NUM_FRAMES_V2 = 9  # 2 Hz frames 0 ... 4 s


class UnscorableScene(TriviumError):
    """The scene itself does not allow a score; results for it are invalid, with this reason."""


@dataclass(frozen=True, eq=False)
class SceneMetricCache:
    """All that scoring one scene needs, as plain arrays."""

    token: str
    log_name: str
    map_location: str
    map_label: str  # "nuplan" | "approx"

    time_us: int  # of now
    ego_state: NDArray[np.float64]  # [11] x, y, heading, vx, vy, ax, ay, steering, its rate, yaw rate, yaw acceleration
    past_time_us: NDArray[np.int64]  # [4] -1.5 ... 0 s
    past_states: NDArray[np.float64]  # [4,11] logged ego states, oldest first; NaN: unknown (then no v2 either)
    human_poses: NDArray[np.float64]  # [8,3] driven poses, ego frame; NaN where the log ends before 4 s

    centerline: NDArray[np.float64]  # [C,3] x, y, heading
    map_polygons: NDArray[np.int32]  # [P] row of the location's PolygonTable, in NAVSIM's order
    map_on_route: NDArray[np.bool_]  # [P] a lane or connector of the corrected route

    track_poses: NDArray[np.float64]  # [n,K,3] box centre x, y, heading at the 2 Hz frames; NaN where not seen
    track_velocities: NDArray[np.float64]  # [n,2] vx, vy of the first sighting (0 for static types)
    track_sizes: NDArray[np.float64]  # [n,3] length, width, height of the first sighting
    track_types: NDArray[np.int8]  # [n] vehicle 0 ... generic_object 6; rows sorted by type, then first sighting

    red_polygons: NDArray[np.int32]  # [r] connector's row in the PolygonTable; connectors on the uncorrected route
    red_frames: NDArray[np.bool_]  # [r,9] red at frame k, hence at steps 5k ... 5k+4 (v2)

    pdm_closed: NDArray[np.float64]  # [V,51,3] PDM-Closed's trajectory at 10 Hz, per version; NaN: version unknown
    pdm_closed_index: NDArray[np.int8]  # [V] chosen proposal, 5 * lateral + longitudinal
    pdm_progress: NDArray[np.float64]  # [V] PDM-Closed's raw progress after simulation [m]
    pdm_multiplier: NDArray[np.float64]  # [V] product of its multiplicative sub-scores
    human_sub_scores: NDArray[np.float64]  # [8] v2 of the human alone: nc, dac, ddc, tlc, ep, ttc, lk, hc; NaN: unknown

    text: NDArray[np.uint8]  # JSON bytes: see the properties below

    # what reactive traffic needs of the map (navsim_ext.pdm.traffic_agents); no path_offsets at all: unknown
    agent_rows: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    agent_kinds: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    agent_path: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    agent_start: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 7)))
    path_offsets: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    path_vertices: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 4)))

    @property
    def versions(self) -> tuple[str, ...]:
        """Scorer versions that predictions can be measured in: those whose PDM-Closed is known."""
        known = np.isfinite(self.pdm_closed).all(axis=(1, 2))
        return tuple(version for version, there in zip(VERSIONS, known) if there)

    @functools.cached_property
    def _lists(self) -> dict[str, Any]:
        return json.loads(self.text.tobytes().decode())

    @property
    def traffic_agents(self) -> TrafficAgents | None:
        """The vehicles on their lanes; None where the record does not say (imported, or built before schema 2)."""
        if not len(self.path_offsets):
            return None
        return TrafficAgents(
            self.agent_rows, self.agent_kinds, self.agent_path, self.agent_start, self.path_offsets, self.path_vertices
        )

    @property
    def route_lane_ids(self) -> list[str]:
        """Lanes and connectors of the corrected route, in order."""
        return self._lists["route_lane_ids"]

    @property
    def route_roadblock_ids(self) -> list[str]:
        """Roadblocks of the corrected route, in order."""
        return self._lists["route_roadblock_ids"]

    @property
    def track_tokens(self) -> list[str]:
        """[n] in row order of ``track_poses``."""
        return self._lists["track_tokens"]

    @property
    def centerline_progress(self) -> NDArray[np.float64]:
        """[C] cumulative chord length along the centreline [m]."""
        steps = np.hypot(*np.diff(self.centerline[:, :2], axis=0).T)
        return np.concatenate([[0.0], np.cumsum(steps)])

    def to_arrays(self) -> dict[str, NDArray]:
        """The record as it goes into a shard: arrays only (the token is the shard's key)."""
        header = {"log_name": self.log_name, "map_location": self.map_location, "map_label": self.map_label}
        arrays = {name: np.asarray(getattr(self, name)) for name in ARRAY_FIELDS}
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        arrays["time_us"] = np.array([self.time_us], dtype=np.int64)
        return arrays

    @classmethod
    def from_arrays(cls, token: str, arrays: Mapping[str, NDArray]) -> SceneMetricCache:
        """Views, no copies; raises DataError naming the token and the field that is missing."""
        try:
            header = json.loads(arrays["header"].tobytes())
            absent = [name for name in OPTIONAL_FIELDS if name not in arrays]
            values = {name: arrays[name] for name in ARRAY_FIELDS if name not in absent}
            return cls(token=token, time_us=int(arrays["time_us"][0]), **header, **values)
        except KeyError as error:
            raise DataError(
                f"metric cache record {token} has no field {error}: another version wrote it; rebuild the cache"
            ) from error

    def validate(self) -> SceneMetricCache:
        """Returns self; raises DataError naming token, field and both values at the first broken promise."""
        n, polygons, red = len(self.track_types), len(self.map_polygons), len(self.red_polygons)
        shapes = {
            "ego_state": (11,), "past_time_us": (4,), "past_states": (4, 11), "human_poses": (8, 3),
            "centerline": (len(self.centerline), 3), "map_on_route": (polygons,),
            "track_poses": (n, NUM_FRAMES, 3), "track_velocities": (n, 2), "track_sizes": (n, 3),
            "red_frames": (red, NUM_FRAMES_V2), "pdm_closed": (2, 51, 3), "pdm_closed_index": (2,),
            "pdm_progress": (2,), "pdm_multiplier": (2,), "human_sub_scores": (8,),
        }  # fmt: skip
        for name, shape in shapes.items():
            found = getattr(self, name).shape
            if found != shape:
                raise DataError(f"metric cache record {self.token}: {name} has shape {found}, {shape} was expected")
        unknown = np.isnan(self.pdm_closed).all(axis=(1, 2)).sum()
        if len(self.versions) + unknown != len(VERSIONS) or not self.versions:
            raise DataError(
                f"metric cache record {self.token}: pdm_closed must be finite for one of {VERSIONS} at least, and "
                f"NaN as a whole for the others; it is finite for {self.versions or 'none'} and NaN for {unknown}"
            )
        always = ("ego_state", "centerline", "track_velocities", "track_sizes")
        for name in (*always, "past_states") if "v2" in self.versions else always:
            if not np.isfinite(getattr(self, name)).all():
                raise DataError(f"metric cache record {self.token}: {name} holds a value that is not finite")
        if len(self.centerline) < 2:
            raise DataError(
                f"metric cache record {self.token}: centreline has {len(self.centerline)} vertices, 2 needed"
            )
        if not (self.track_sizes[:, :2] > 0.0).all():
            bad = int(np.argwhere(~(self.track_sizes[:, :2] > 0.0))[0, 0])
            raise DataError(
                f"metric cache record {self.token}: track {self.track_tokens[bad]} has the degenerate size "
                f"{self.track_sizes[bad].tolist()}; lengths and widths must be positive"
            )
        agents = len(self.agent_rows)
        lengths = {len(self.agent_kinds), len(self.agent_path), len(self.agent_start), agents}
        if len(lengths) != 1 or not np.isfinite(self.agent_start).all() or not np.isfinite(self.path_vertices).all():
            raise DataError(
                f"metric cache record {self.token}: the {agents} vehicles of its traffic are of unequal lengths "
                f"{lengths} or not finite"
            )
        seen, absent = np.isfinite(self.track_poses).all(axis=-1), np.isnan(self.track_poses).all(axis=-1)
        if not seen.any(axis=1).all() or not (seen | absent).all():
            raise DataError(f"metric cache record {self.token}: a track is never seen or has a half-finite pose")
        return self


ARRAY_FIELDS = tuple(
    item.name
    for item in fields(SceneMetricCache)
    if item.name not in ("token", "log_name", "map_location", "map_label", "time_us")
)
OPTIONAL_FIELDS = tuple(item.name for item in fields(SceneMetricCache) if item.default_factory is not MISSING)


def encode_text(
    *, route_lane_ids: Sequence[str], route_roadblock_ids: Sequence[str], track_tokens: Sequence[str]
) -> NDArray[np.uint8]:
    """The ``text`` array of a record."""
    lists = {
        "route_lane_ids": list(route_lane_ids),
        "route_roadblock_ids": list(route_roadblock_ids),
        "track_tokens": list(track_tokens),
    }
    return np.frombuffer(json.dumps(lists, separators=(",", ":")).encode(), dtype=np.uint8)
