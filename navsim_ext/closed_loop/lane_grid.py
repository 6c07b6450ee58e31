"""Which lanes lie under a point, on a grid: the directions of up to three lanes, and the distance to the nearest.

A node holds what is true at its place; a point asks the nearest node (at most 0.71 m away with cells of 1 m), and the
distance to the nearest centre line is corrected for the offset from the node along the lane's normal.

Legend: (H, W) nodes, D = 3 lanes of a node, S scenes, B worlds; metres.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from navsim_ext.pdm.compiled import kernel

CELL_M = 1.0
LANES_OF_A_NODE = 3  # D
LANE_REACH_M = 2.75  # m from a centre line that still belongs to the lane
SAMPLE_M = 0.5


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
        samples, headings, owner = _samples(lanes)
        squared = np.full((H * W, LANES_OF_A_NODE), np.inf)
        nearest = np.full((H * W, LANES_OF_A_NODE), -1)
        _stamp(samples, owner, origin, (int(H), int(W)), squared, nearest)
        reached = nearest >= 0
        direction = np.where(reached, np.exp(1j * headings[nearest]) if len(headings) else 0.0, 0.0)
        offset = np.full(H * W, np.nan, np.float32)
        node = np.flatnonzero(reached[:, 0])
        first = nearest[node, 0]
        d = origin + CELL_M * np.stack([node % W, node // W], axis=1) - samples[first]
        offset[node] = np.cos(headings[first]) * d[:, 1] - np.sin(headings[first]) * d[:, 0]
        return cls(direction.astype(np.complex64).reshape(H, W, -1), offset.reshape(H, W), origin)


def _samples(lanes: list[NDArray[np.floating]]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """(points [n,2] every half metre, headings [n], lane [n])."""
    if not lanes:
        return np.empty((0, 2)), np.empty(0), np.empty(0, np.int64)
    lines = [np.asarray(lane, np.float64) for lane in lanes]
    starts, ends = np.concatenate([line[:-1] for line in lines]), np.concatenate([line[1:] for line in lines])
    owner = np.repeat(np.arange(len(lines)), [len(line) - 1 for line in lines])
    step = ends - starts
    length = np.hypot(step[:, 0], step[:, 1])
    keep = length > 1e-6
    starts, step, length, owner = starts[keep], step[keep], length[keep], owner[keep]
    pieces = np.maximum(np.ceil(length / SAMPLE_M).astype(int), 1)
    segment = np.repeat(np.arange(len(starts)), pieces)
    share = (np.arange(len(segment)) - np.repeat(np.cumsum(pieces) - pieces, pieces) + 0.5) / pieces[segment]
    return starts[segment] + share[:, None] * step[segment], np.arctan2(step[:, 1], step[:, 0])[segment], owner[segment]


@kernel
def _stamp(samples, owner, origin, shape, squared, nearest):
    """For every node the nearest sample of each of the LANES_OF_A_NODE nearest lanes within reach, nearest first."""
    H, W = shape
    reach = LANE_REACH_M
    for i in range(len(samples)):
        x, y = samples[i, 0] - origin[0], samples[i, 1] - origin[1]
        c0, c1 = max(int(np.ceil((x - reach) / CELL_M)), 0), min(int(np.floor((x + reach) / CELL_M)), W - 1)
        r0, r1 = max(int(np.ceil((y - reach) / CELL_M)), 0), min(int(np.floor((y + reach) / CELL_M)), H - 1)
        for r in range(r0, r1 + 1):
            for c in range(c0, c1 + 1):
                d = (c * CELL_M - x) ** 2 + (r * CELL_M - y) ** 2
                if d > reach * reach:
                    continue
                node = r * W + c
                slot = LANES_OF_A_NODE - 1  # where it goes: the lane's own place, else the last
                for k in range(LANES_OF_A_NODE):
                    if nearest[node, k] >= 0 and owner[nearest[node, k]] == owner[i]:
                        slot = k
                if d >= squared[node, slot]:
                    continue
                while slot > 0 and d < squared[node, slot - 1]:
                    squared[node, slot], nearest[node, slot] = squared[node, slot - 1], nearest[node, slot - 1]
                    slot -= 1
                squared[node, slot], nearest[node, slot] = d, i


@dataclass
class LaneGrids:
    """The lane grids of S scenes, padded to one size."""

    cos: Tensor  # [D,S*H*W] float32 of the lanes' headings; (0, 0): no lane
    sin: Tensor  # [D,S*H*W]
    offset: Tensor  # [S*H*W] float32
    shape: tuple[int, int]
    origin: Tensor  # [S,2] float32 m
    row: Tensor  # [S] int64: whose grid a scene has; several scenes may share one

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
            torch.arange(len(grids), device=device),
        )

    def select(self, scenes: Int64[Tensor, " n"]) -> LaneGrids:
        """Those of some scenes, which may repeat; nothing is copied."""
        return replace(self, row=self.row[scenes])

    def _index(self, x: Tensor, y: Tensor, scene: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(row of the nearest node [B,N,K], offset of the point from it x, y, inside [B,N,K])."""
        H, W = self.shape
        scene = self.row[scene]
        origin = self.origin[scene][..., None, None]
        column_at, row_at = (x - origin[:, 0]) / CELL_M, (y - origin[:, 1]) / CELL_M
        inside = (column_at > -0.5) & (row_at > -0.5) & (column_at < W - 0.5) & (row_at < H - 0.5)
        column, row = column_at.round().clamp_(0, W - 1), row_at.round().clamp_(0, H - 1)
        index = (row * W + column).long() + (scene * (H * W))[:, None, None]
        return index, (column_at - column) * CELL_M, (row_at - row) * CELL_M, inside

    def against(
        self,
        x: Float[Tensor, "B N K"],
        y: Float[Tensor, "B N K"],
        cos: Float[Tensor, "B N K"],
        sin: Float[Tensor, "B N K"],
        scene: Int64[Tensor, " B"],
    ) -> tuple[Bool[Tensor, "B N K"], Bool[Tensor, "B N K"]]:
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

    def offset_at(
        self, x: Float[Tensor, "B N K"], y: Float[Tensor, "B N K"], scene: Int64[Tensor, " B"]
    ) -> Float[Tensor, "B N K"]:
        """[B,N,K] signed distance [m] to the nearest centre line, left of it positive; NaN where no lane is near."""
        return self.nearest(x, y, scene)[0]

    def nearest(
        self, x: Float[Tensor, "B N K"], y: Float[Tensor, "B N K"], scene: Int64[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B N K"], Float[Tensor, "B N K"], Float[Tensor, "B N K"]]:
        """(:meth:`offset_at`, cosine and sine of the lane's heading) [B,N,K] of the nearest lane; 0 where none is."""
        index, dx, dy, inside = self._index(x, y, scene)
        cos, sin = self.cos[0].take(index), self.sin[0].take(index)
        return torch.where(inside, self.offset.take(index) + dy * cos - dx * sin, torch.nan), cos, sin
