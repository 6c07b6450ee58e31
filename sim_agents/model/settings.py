"""Sizes of a next-token network. Two configurations of one class: ``smart`` and ``motionlm``."""

from __future__ import annotations

from dataclasses import dataclass

from navsim_ext.errors import DataError

GEOMETRIES = ("relative", "scene")


@dataclass(frozen=True)
class NetworkSettings:
    """``tokens`` is the width of the head (the vocabulary's size).

    ``geometry`` "relative" (SMART): who asks sees the others from its own pose, within radii. "scene" (MotionLM):
    all poses are numbers in the scene's frame, the map is summed up by ``latents`` queries, and every road user
    sees every other.
    """

    tokens: int
    geometry: str = "relative"
    width: int = 64
    heads: int = 4
    blocks: int = 2
    map_layers: int = 1
    window: int = 6  # tokens of its own past that a road user sees, the present one included
    near_pieces: int = 12  # of a piece of the map
    near_map: int = 24  # pieces that a road user sees
    near_lights: int = 4
    near_agents: int = 12
    radius_pieces: float = 10.0  # m
    radius_map: float = 30.0
    radius_agents: float = 60.0
    latents: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.geometry not in GEOMETRIES:
            raise DataError(f"geometry={self.geometry}: one of {', '.join(GEOMETRIES)} was expected")
        if self.width % self.heads:
            raise DataError(f"width={self.width} is no multiple of heads={self.heads}")
        if (self.latents > 0) != (self.geometry == "scene"):
            raise DataError(f"geometry={self.geometry}, latents={self.latents}: latents are for geometry=scene alone")
        counts = "tokens width heads blocks window near_map near_agents near_lights near_pieces".split()
        for name in counts:
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if not 0.0 <= self.dropout < 1.0:
            raise DataError(f"dropout={self.dropout}: 0 <= dropout < 1 was expected")
