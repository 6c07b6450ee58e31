"""Reactive traffic written naively on shapely, as its specification reads: what the compiled one is held against."""

from __future__ import annotations

import math

import numpy as np
from shapely import LineString, Polygon, STRtree
from shapely.ops import nearest_points, unary_union

from navsim_ext.pdm.ego import box_corners
from navsim_ext.pdm.traffic_agents import IS_ACTIVE, STAYS, TrafficAgents


def box(x: float, y: float, heading: float, length: float, width: float) -> Polygon:
    corners = np.empty((4, 2))
    box_corners(x, y, heading, length / 2.0, width / 2.0, corners)
    return Polygon(corners)


def buffered(line: np.ndarray, width: float) -> Polygon:
    return LineString(line).buffer(width / 2.0, quad_segs=16, cap_style="flat")


def wrapped(angle: float) -> float:
    return (angle + math.pi) % (2.0 * math.pi) - math.pi


class Path:
    """Vertices [v,4] x, y, unwrapped heading, progress."""

    def __init__(self, vertices: np.ndarray) -> None:
        self.vertices, self.progress = vertices, vertices[:, 3]
        self.start, self.end = vertices[0, 3], vertices[-1, 3]

    def clamp(self, p: float) -> float:
        return max(self.start, min(p, self.end))

    def pose(self, p: float) -> tuple[float, float, float]:
        i = min(max(int(np.searchsorted(self.progress, p)), 1), len(self.progress) - 1)
        a, b = self.vertices[i - 1], self.vertices[i]
        x, y, heading, _ = (b - a) / (b[3] - a[3]) * (p - a[3]) + a
        return x, y, wrapped(heading)

    def to_go(self, p: float) -> np.ndarray:
        ahead = self.vertices[self.progress > p, :2]
        return np.vstack([self.pose(p)[:2], ahead]) if len(ahead) else self.vertices[-2:, :2]

    def piece(self, begin: float, end: float) -> np.ndarray:
        if begin == self.end:
            return self.vertices[-2:, :2]
        if end == self.start:
            return self.vertices[:2, :2]
        middle = self.vertices[(self.progress > begin) & (self.progress < end), :2]
        return np.vstack([self.pose(begin)[:2], middle, self.pose(end)[:2]])


class Vehicle:
    def __init__(self, path: Path, start: np.ndarray, length: float, width: float) -> None:
        self.path, self.length, self.width = path, length, width
        self.p, self.v, self.target, self.limit = start[:4]
        self.area = box(*start[4:7], length, width)

    def pose(self) -> tuple[float, float, float]:
        return self.path.pose(self.path.clamp(self.p))

    def box(self) -> Polygon:
        return box(*self.pose(), self.length, self.width)

    def claim(self) -> Polygon:
        begin = self.path.clamp(self.p - self.length / 2.0)
        end = self.path.clamp(self.p + self.length / 2.0 + 1.5 * self.v)
        return unary_union([buffered(self.path.piece(begin, end), self.width), self.box()])

    def advance(self, x_lead: float, v_lead: float, rear: float) -> None:
        if self.limit > 0.0:
            self.target = self.limit
        desired = 1.0 + 1.5 * self.v + self.v * (self.v - v_lead) / (2.0 * math.sqrt(2.0))
        gap = max(x_lead - rear, 1.0)
        change = min(max(1.0 - (self.v / self.target) ** 4 - (desired / gap) ** 2, -2.0), 1.0)
        self.p, self.v = self.p + 0.1 * self.v, max(self.v + 0.1 * change, 0.0)


def simulate_naively(
    agents: TrafficAgents, sizes: np.ndarray, poses: np.ndarray, ego_states: np.ndarray
) -> list[dict[int, tuple[float, float, float]]]:
    """Per step 1 ... 40: pose of each vehicle that is shown, in list order of NAVSIM's output."""
    paths = [Path(agents.path_vertices[a:b]) for a, b in zip(agents.path_offsets, agents.path_offsets[1:])]
    vehicles = {
        i: Vehicle(paths[agents.path[i]], agents.start[i], *sizes[i, :2])
        for i in range(len(agents.rows))
        if agents.kinds[i] & IS_ACTIVE
    }
    steps = []
    for step in range(1, len(ego_states)):
        ego = ego_states[step - 1]
        ego_area = box(*ego[:3], 5.176, 2.297)
        vehicles = {i: a for i, a in vehicles.items() if math.dist(a.pose()[:2], ego[:2]) <= 100.0}
        for i, agent in vehicles.items():
            areas = {j: other.area.simplify(1e-5) for j, other in vehicles.items()}
            areas["ego"] = ego_area.simplify(1e-5)
            corridor = buffered(agent.path.to_go(agent.path.clamp(agent.p)), agent.width)
            hits = {j: area for j, area in areas.items() if area.intersects(corridor)}
            own = hits.pop(i)
            if hits:
                leader = list(hits)[STRtree(list(hits.values())).nearest(own)]
                near, far = nearest_points(own, hits[leader])
                if leader == "ego":
                    speed, heading = math.hypot(ego[3], ego[4]), ego[2]
                else:
                    speed, heading = vehicles[leader].v, vehicles[leader].pose()[2]
                agent.advance(near.distance(far), speed * math.cos(wrapped(heading - agent.pose()[2])), 0.0)
            else:
                agent.advance(agent.path.end - agent.p, 0.0, agent.length / 2.0)
            agent.area = agent.claim()
        shown = {i: agent.pose() for i, agent in vehicles.items()}
        boxes = [agent.box() for agent in vehicles.values()]
        for i in range(len(agents.rows)):
            still = box(*poses[i], *sizes[i, :2])
            if i not in vehicles and agents.kinds[i] & STAYS and not any(still.intersects(other) for other in boxes):
                shown[i] = tuple(poses[i])
                boxes.append(still)
        steps.append(shown)
    return steps
