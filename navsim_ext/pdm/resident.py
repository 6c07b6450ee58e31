"""Scenes made ready for the kernels, and kept: replayed traffic, indexed map, past, reference terms, as flat arrays."""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections import OrderedDict
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from navsim_ext.pdm.areas import Surroundings, make_surroundings
from navsim_ext.pdm.comfort import ComfortFilters, comfort_filters
from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.ego import AX, AY, HEADING, NUM_STEPS, REAR_AXLE_TO_CENTER, principal, unwrap_correction
from navsim_ext.pdm.log_replay import replay
from navsim_ext.pdm.map_index import MapIndex, index_map
from navsim_ext.pdm.polygon_table import PolygonTable
from navsim_ext.pdm.reactive.world import (
    ReactiveWorld,
    closed_multiplier,
    constant_velocity_traffic,
    human_in,
    open_world,
    reactive_world,
)
from navsim_ext.pdm.record import SceneMetricCache, UnscorableScene
from navsim_ext.pdm.traffic import V1, V2, Traffic

PAST_INTERVAL_US = 100_000
MAP_RADIUS = 100.0  # m, half side of the map patch


class ResidentScene(NamedTuple):
    """What the scoring kernel gets. Versions are in the order v1, v2."""

    ego_state: NDArray[np.float64]  # [11]
    time_us: int
    surroundings: Surroundings
    traffic: Traffic
    past: NDArray[np.float64]  # [H,3] heading, ax, ay at 10 Hz up to -0.2 s (NAVSIM drops the last sample)
    filters_v1: ComfortFilters
    filters_v2: ComfortFilters
    reference_progress: NDArray[np.float64]  # [2] PDM-Closed's raw progress [m]
    reference_multiplier: NDArray[np.float64]  # [2] and its multiplicative product
    human: NDArray[np.float64]  # [8] the human's v2 sub-scores


@functools.lru_cache(maxsize=64)
def indexed(table: PolygonTable) -> MapIndex:
    """The index of a polygon table, built once per process and table."""
    return index_map(table)


def prepare(scene: SceneMetricCache, table: PolygonTable) -> ResidentScene:
    """Record + polygons -> kernel input. Raises UnscorableScene when the map patch is empty, far away or degenerate."""
    index = indexed(table)
    _check_map(scene, table, index)
    past = past_rows(scene.past_states, scene.past_time_us)
    rows = scene.map_polygons
    return ResidentScene(
        ego_state=np.array(scene.ego_state),
        time_us=scene.time_us,
        surroundings=make_surroundings(index, rows, table.types[rows], scene.map_on_route, scene.centerline),
        traffic=replay(scene),
        past=past,
        filters_v1=comfort_filters("v1", NUM_STEPS),
        filters_v2=comfort_filters("v2", NUM_STEPS + len(past)),
        reference_progress=np.array(scene.pdm_progress),
        reference_multiplier=np.array(scene.pdm_multiplier),
        human=np.array(scene.human_sub_scores),
    )


def prepare_for(
    scene: SceneMetricCache, table: PolygonTable, traffic: str
) -> tuple[ResidentScene, ReactiveWorld | None]:
    """Kernel input under a traffic policy of NAVSIM 2, and the world that reacts (None: it does not).

    PDM-Closed and the human are measured in the same traffic. Raises UnscorableScene where the scene does not allow it.
    """
    arrays = prepare(scene, table)
    if traffic == "log_replay":
        return arrays, None
    if traffic == "reactive":
        world = reactive_world(scene, arrays.surroundings)
        arrays = arrays._replace(traffic=open_world(scene))
        return arrays._replace(human=human_in(scene, arrays.surroundings, arrays.traffic, world)), world
    arrays = arrays._replace(traffic=constant_velocity_traffic(scene))
    multiplier = np.array([np.nan, closed_multiplier(scene, arrays.surroundings, arrays.traffic)])
    human = human_in(scene, arrays.surroundings, arrays.traffic, None)
    return arrays._replace(reference_multiplier=multiplier, human=human), None


class LoadedScene(NamedTuple):
    """A prepared scene and what results say about it."""

    arrays: ResidentScene
    log_name: str
    map_label: str
    versions: int  # bits V1 and V2 of those that the record has a reference for
    world: ReactiveWorld | None = None  # under reactive traffic


class SceneRecords(Protocol):
    """Where the scorer finds its scenes: a metric cache on disk, or records in memory."""

    @property
    def resident(self) -> ResidentScenes:
        """The prepared scenes of these records."""

    def __contains__(self, token: object) -> bool:
        """Whether there is a record of the token."""

    def load(self, token: str) -> SceneMetricCache:
        """The record; raises MissingError saying why there is none."""

    def why_missing(self, token: str) -> str:
        """Why a token has no record."""

    def polygons(self, location: str) -> PolygonTable:
        """The polygons of a map."""


class ResidentScenes:
    """Scenes that stay prepared for the scorer between calls; of more than ``capacity`` the least recently used go.

    Safe from several threads: two that ask for one scene at once may both prepare it, and either result will do.
    """

    def __init__(self, records: SceneRecords, capacity: int) -> None:
        self.capacity = capacity
        self._records = weakref.proxy(records)  # the records own this object
        self._scenes: OrderedDict[tuple[str, str], LoadedScene] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._scenes)

    def scene(self, token: str, traffic: str = "log_replay") -> LoadedScene:
        """The prepared scene of a token under a traffic policy.

        Raises MissingError for a token without a record, UnscorableScene where the scene allows no score.
        """
        key = (token, traffic)
        with self._lock:
            loaded = self._scenes.get(key)
            if loaded is not None:
                self._scenes.move_to_end(key)
                return loaded
        record = self._records.load(token)
        versions = sum({"v1": V1, "v2": V2}[version] for version in record.versions)
        if traffic != "log_replay" and not versions & V2:
            raise UnscorableScene(f"traffic={traffic} is NAVSIM 2's, and the metric cache has this scene in v1 only")
        arrays, world = prepare_for(record, self._records.polygons(record.map_location), traffic)
        loaded = LoadedScene(arrays, record.log_name, record.map_label, versions, world)
        with self._lock:
            self._scenes[key] = loaded
            while len(self._scenes) > self.capacity:
                self._scenes.popitem(last=False)
        return loaded


def past_rows(states: NDArray[np.float64], times_us: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logged states [4,11] at ``times_us`` [4] -> rows [H,3] (heading, ax, ay) for v2's history comfort.

    NAVSIM samples every 0.1 s from the first stamp, end exclusive, and then drops the last sample: with exact 0.5 s
    stamps the past ends at -0.2 s; a microsecond more and there is one more row.
    """
    samples = np.arange(times_us[0], times_us[-1], PAST_INTERVAL_US, dtype=np.int64)[:-1]
    return _interpolate_past(np.ascontiguousarray(states), np.ascontiguousarray(times_us, dtype=np.int64), samples)


@kernel
def _interpolate_past(states, times_us, samples):
    rows = np.empty((len(samples), 3))
    headings = states[:, HEADING].copy()
    correction = 0.0
    for i in range(1, len(headings)):
        correction = unwrap_correction(states[i - 1, HEADING], states[i, HEADING], correction)
        headings[i] += correction
    high = 1
    for i in range(len(samples)):
        while high < len(times_us) - 1 and times_us[high] < samples[i]:
            high += 1
        low = high - 1
        span, elapsed = float(times_us[high] - times_us[low]), float(samples[i] - times_us[low])
        rows[i, 0] = principal((headings[high] - headings[low]) / span * elapsed + headings[low])
        rows[i, 1] = (states[high, AX] - states[low, AX]) / span * elapsed + states[low, AX]
        rows[i, 2] = (states[high, AY] - states[low, AY]) / span * elapsed + states[low, AY]
    return rows


def _check_map(scene: SceneMetricCache, table: PolygonTable, index: MapIndex) -> None:
    rows = np.array(scene.map_polygons)
    if len(rows) == 0:
        raise UnscorableScene(f"empty map patch: no polygon of {scene.map_location} within {MAP_RADIUS:g} m of the ego")
    outside, flat, gap = _map_patch(rows, index.bounds, np.array(scene.ego_state))
    if outside >= 0:
        raise UnscorableScene(f"map polygon {rows[outside]} is not in the table of {scene.map_location}")
    if flat >= 0:
        raise UnscorableScene(f"degenerate map polygon {table.ids[rows[flat]]} of {scene.map_location}")
    if not gap <= MAP_RADIUS:
        raise UnscorableScene(f"the ego is {gap:.0f} m off the map of {scene.map_location}")


@kernel
def _map_patch(rows, bounds, ego_state):
    """(first row outside the table or -1, first polygon without extent or -1, gap [m] from the ego to the nearest)."""
    x = ego_state[0] + REAR_AXLE_TO_CENTER * math.cos(ego_state[2])
    y = ego_state[1] + REAR_AXLE_TO_CENTER * math.sin(ego_state[2])
    outside, flat, nearest = -1, -1, math.inf
    for p in range(len(rows)):
        q = rows[p]
        if q < 0 or q >= len(bounds):
            return p, flat, nearest
        if flat < 0 and not (bounds[q, 2] > bounds[q, 0] and bounds[q, 3] > bounds[q, 1]):
            flat = p
        gap_x, gap_y = max(bounds[q, 0] - x, x - bounds[q, 2]), max(bounds[q, 1] - y, y - bounds[q, 3])
        nearest = min(nearest, max(max(gap_x, gap_y), 0.0))
    return outside, flat, nearest
