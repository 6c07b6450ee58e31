"""Signed distance to the edge of the road on a grid: made once per scene, looked up for every corner of every box.

Positive on the road, negative off it, NaN where the map says nothing (outside the grid). Between the nodes of the grid
the distance is interpolated bilinearly: exact along a straight edge, and off by less than a quarter of a cell
at corners and half-way between two edges (measured in the tests). What is at its nodes is exact: see
:mod:`navsim_ext.traffic.road_edges`.

Legend: G segments, (H, W) nodes of a grid, S scenes, B = S R worlds; metres.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from navsim_ext.traffic.road_edges import area_grid, edge_grid

CELL_M = 0.5
MARGIN_M = 10.0  # of the grid around what it must cover


@dataclass(frozen=True)
class Grid:
    """One scene's signed distances at nodes ``origin`` + (column, row) * CELL_M; the outermost ring is NaN."""

    values: NDArray[np.float32]  # [H,W]
    origin: NDArray[np.float64]  # [2] m

    @classmethod
    def build(
        cls,
        edges: list[NDArray[np.floating]],
        closed: list[bool],
        areas: list[NDArray[np.floating]],
        low: NDArray[np.floating],
        high: NDArray[np.floating],
        cell: float = CELL_M,
    ) -> Grid:
        """The grid over [low, high] with a margin; drivable areas decide where there are any, else road edges."""
        origin = np.asarray(low, np.float64) - MARGIN_M
        W, H = np.ceil((np.asarray(high) + MARGIN_M - origin) / cell).astype(int) + 1
        shape = (int(H), int(W))
        found = area_grid(areas, origin, cell, shape) if areas else edge_grid(edges, closed, origin, cell, shape)
        values = found.astype(np.float32)
        values[[0, -1]] = np.nan
        values[:, [0, -1]] = np.nan
        return cls(values, origin)


@dataclass
class DistanceGrids:
    """The grids of S scenes, padded with NaN to one size; a scene's own distances do not depend on the others."""

    flat: Tensor  # [S*H*W] float32
    shape: tuple[int, int]  # H, W
    origin: Tensor  # [S,2] float32, in cells
    cell: float
    row: Tensor  # [S] int64: whose grid a scene has; several scenes may share one

    @classmethod
    def stack(cls, grids: list[Grid], device: torch.device | str, cell: float = CELL_M) -> DistanceGrids:
        H, W = (max(grid.values.shape[axis] for grid in grids) for axis in (0, 1))
        values = np.full((len(grids), H, W), np.nan, np.float32)
        for row, grid in zip(values, grids):
            row[: grid.values.shape[0], : grid.values.shape[1]] = grid.values
        origin = np.array([grid.origin / cell for grid in grids], np.float32)
        row = torch.arange(len(grids), device=device)
        return cls(torch.from_numpy(values.ravel()).to(device), (H, W), torch.from_numpy(origin).to(device), cell, row)

    def select(self, scenes: Int64[Tensor, " n"]) -> DistanceGrids:
        """Those of some scenes, which may repeat; nothing is copied."""
        return replace(self, row=self.row[scenes])

    def at(
        self, x: Float[Tensor, "*any B N K"], y: Float[Tensor, "*any B N K"], scene: Int64[Tensor, " B"]
    ) -> Float[Tensor, "*any B N K"]:
        """Signed distances [...,B,N,K] at points [...,B,N,K] of the worlds' ``scene`` numbers [B]; NaN: unknown."""
        H, W = self.shape
        scene = self.row[scene]
        origin = self.origin[scene][..., None, None]  # [B,2,1,1]
        column_at = (x / self.cell - origin[:, 0]).clamp_(0.0, W - 1.001)
        row_at = (y / self.cell - origin[:, 1]).clamp_(0.0, H - 1.001)
        column, row = column_at.floor(), row_at.floor()
        index = row.mul(W).add_(column).long().add_((scene * (H * W))[:, None, None])
        column_at.sub_(column)
        row_at.sub_(row)
        flat = self.flat
        low = torch.lerp(flat.take(index), flat.take(index + 1), column_at)
        index += W
        high = torch.lerp(flat.take(index), flat.take(index + 1), column_at)
        return torch.lerp(low, high, row_at)
