"""Which lanes lie under a point, on a grid: the directions of up to three lanes, and the distance to the nearest.

A node holds what is true at its place; a point asks the nearest node (at most 0.71 m away with cells of 1 m), and the
distance to the nearest centre line is corrected for the offset from the node along the lane's normal.

Legend: (H, W) nodes, D = 3 lanes of a node, S scenes, B worlds; metres.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

CELL_M = 1.0
LANES_OF_A_NODE = 3  # D
LANE_REACH_M = 2.75  # m from a centre line that still belongs to the lane
SAMPLE_M = 0.5
CANDIDATES = 16  # samples asked per node


@dataclass(frozen=True)
class LaneGrid:
    """One scene's lanes at nodes ``origin`` + (column, row) CELL_M."""

    direction: NDArray[np.complex64]  # [H,W,D] exp(i heading) of the lane, 0: no (further) lane within reach
    offset: NDArray[np.float32]  # [H,W] signed distance to the nearest centre line, left of it positive; NaN: none
    origin: NDArray[np.float64]  # [2]

    @classmethod
    def build(
        cls, lanes: list[NDArray[np.floating]], low: NDArray[np.floating], high: NDArray[np.floating]
    ) -> LaneGrid:
        origin = np.asarray(low, np.float64)
        W, H = np.maximum(np.ceil((np.asarray(high) - origin) / CELL_M).astype(int) + 1, 3)
        direction = np.zeros((H * W, LANES_OF_A_NODE), np.complex64)
        offset = np.full(H * W, np.nan, np.float32)
        samples, headings, owner = _samples(lanes)
        if len(samples):
            columns, rows = np.meshgrid(np.arange(W), np.arange(H))
            nodes = origin + CELL_M * np.stack([columns.ravel(), rows.ravel()], axis=1)
            tree = cKDTree(samples)
            reached = np.flatnonzero(tree.query(nodes, distance_upper_bound=LANE_REACH_M)[0] <= LANE_REACH_M)
            distance, near = tree.query(nodes[reached], k=CANDIDATES, distance_upper_bound=LANE_REACH_M)
            found = np.where(np.isfinite(distance), np.minimum(near, len(samples) - 1), -1)
            first = found[:, 0]
            d = nodes[reached] - samples[first]
            offset[reached] = np.cos(headings[first]) * d[:, 1] - np.sin(headings[first]) * d[:, 0]
            taken = np.full((len(reached), LANES_OF_A_NODE), -1)
            for column in found.T:  # nearest first: the first sample of each lane that a node has not yet
                lane = np.where(column >= 0, owner[column], -1)
                new = (lane >= 0) & (taken != lane[:, None]).all(axis=1) & (taken[:, -1] < 0)
                slot = (taken >= 0).sum(axis=1)
                rows_new = np.flatnonzero(new)
                taken[rows_new, slot[new]] = lane[new]
                direction[reached[rows_new], slot[new]] = np.exp(1j * headings[column[new]])
        return cls(direction.reshape(H, W, -1), offset.reshape(H, W), origin)


def _samples(lanes: list[NDArray[np.floating]]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """(points [n,2] every half metre, headings [n], lane [n])."""
    points, headings, owner = [], [], []
    for index, lane in enumerate(lanes):
        lane = np.asarray(lane, np.float64)
        step = np.diff(lane, axis=0)
        length = np.hypot(step[:, 0], step[:, 1])
        keep = length > 1e-6
        for a, d, l in zip(lane[:-1][keep], step[keep], length[keep]):
            share = (np.arange(max(int(np.ceil(l / SAMPLE_M)), 1)) + 0.5) / max(int(np.ceil(l / SAMPLE_M)), 1)
            points.append(a + share[:, None] * d)
            headings.append(np.full(len(share), np.arctan2(d[1], d[0])))
            owner.append(np.full(len(share), index))
    if not points:
        return np.empty((0, 2)), np.empty(0), np.empty(0, np.int64)
    return np.concatenate(points), np.concatenate(headings), np.concatenate(owner)


@dataclass
class LaneGrids:
    """The lane grids of S scenes, padded to one size."""

    cos: Tensor  # [D,S*H*W] float32 of the lanes' headings; (0, 0): no lane
    sin: Tensor  # [D,S*H*W]
    offset: Tensor  # [S*H*W] float32
    shape: tuple[int, int]
    origin: Tensor  # [S,2] float32 m

    @classmethod
    def stack(cls, grids: list[LaneGrid], device: torch.device | str) -> LaneGrids:
        H, W = (max(grid.offset.shape[axis] for grid in grids) for axis in (0, 1))
        direction = np.zeros((len(grids), H, W, LANES_OF_A_NODE), np.complex64)
        offset = np.full((len(grids), H, W), np.nan, np.float32)
        for row, grid in enumerate(grids):
            h, w = grid.offset.shape
            direction[row, :h, :w], offset[row, :h, :w] = grid.direction, grid.offset
        origin = np.array([grid.origin for grid in grids], np.float32)
        flat = np.ascontiguousarray(direction.reshape(-1, LANES_OF_A_NODE).T)
        return cls(
            torch.from_numpy(np.ascontiguousarray(flat.real)).to(device),
            torch.from_numpy(np.ascontiguousarray(flat.imag)).to(device),
            torch.from_numpy(offset.ravel()).to(device),
            (H, W),
            torch.from_numpy(origin).to(device),
        )

    def _index(self, x: Tensor, y: Tensor, scene: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(row of the nearest node [B,N,K], offset of the point from it x, y, inside [B,N,K])."""
        H, W = self.shape
        origin = self.origin[scene][..., None, None]
        column_at, row_at = (x - origin[:, 0]) / CELL_M, (y - origin[:, 1]) / CELL_M
        inside = (column_at > -0.5) & (row_at > -0.5) & (column_at < W - 0.5) & (row_at < H - 0.5)
        column, row = column_at.round().clamp_(0, W - 1), row_at.round().clamp_(0, H - 1)
        index = (row * W + column).long() + (scene * (H * W))[:, None, None]
        return index, (column_at - column) * CELL_M, (row_at - row) * CELL_M, inside

    def against(self, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
        """(wrong way, valid) bool [B,N,K]: a lane lies at (x, y), and none of them within 90 degrees of (cos, sin)."""
        index, _, _, inside = self._index(x, y, scene)
        along = torch.zeros_like(inside)
        there = torch.zeros_like(inside)
        for d in range(LANES_OF_A_NODE):
            lane_cos, lane_sin = self.cos[d].take(index), self.sin[d].take(index)
            there |= lane_cos.abs() + lane_sin.abs() > 0.5
            along |= lane_cos * cos + lane_sin * sin > 0.0  # 0 where there is no lane
        valid = there & inside
        return valid & ~along, valid

    def offset_at(self, x: Tensor, y: Tensor, scene: Tensor) -> Tensor:
        """[B,N,K] signed distance [m] to the nearest centre line, left of it positive; NaN where no lane is near."""
        index, dx, dy, inside = self._index(x, y, scene)
        normal = dy * self.cos[0].take(index) - dx * self.sin[0].take(index)
        return torch.where(inside, self.offset.take(index) + normal, torch.nan)
