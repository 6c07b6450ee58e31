"""Small traffic scenes made by hand, and a vocabulary and network over them."""

from __future__ import annotations

import numpy as np
import torch

from navsim_ext.traffic.codes import AgentKind, LightState, PieceKind, Role
from navsim_ext.traffic.scene import TrafficScene
from sim_agents.model.network import NextTokenNetwork
from sim_agents.model.settings import NetworkSettings
from sim_agents.vocabulary import VerletVocabulary

STEPS, NOW = 91, 10


def street(name: str = "street", *, agents: int = 5, seed: int = 0, late: bool = False) -> TrafficScene:
    """A straight street with ``agents`` road users of all classes that turn gently; ``late`` lets the last one appear
    later."""
    rng = np.random.default_rng(seed)
    time = np.arange(STEPS) * 0.1
    phase = rng.uniform(0, 6, (2, agents, 1))
    speed = rng.uniform(2.0, 12.0, agents)[:, None] * (1.0 + 0.4 * np.sin(0.9 * time + phase[0]))
    rate = 0.2 * np.sin(0.6 * time + phase[1])
    heading = rng.uniform(-0.2, 0.2, agents)[:, None] + np.cumsum(rate, axis=1) * 0.1
    steps = speed[..., None] * 0.1 * np.stack([np.cos(heading), np.sin(heading)], axis=-1)
    start = np.stack([rng.uniform(-30, 30, agents), np.arange(agents) * 5.0], axis=-1)
    xy = start[:, None] + np.cumsum(steps, axis=1) - steps[:, :1]
    valid = np.ones((agents, STEPS), bool)
    if late:
        valid[-1, :33] = False
    kind = np.array([AgentKind.VEHICLE, AgentKind.CYCLIST, AgentKind.PEDESTRIAN] * agents, np.uint8)[:agents]
    role = np.zeros(agents, np.uint8)
    role[0], role[1:3] = Role.EGO, Role.PREDICT
    lane = np.stack([np.linspace(-60, 60, 41), np.zeros(41)], axis=-1)
    pieces = [lane, lane + np.array([0.0, 4.0]), np.stack([lane[:, 0], np.full(41, -3.0)], axis=-1)]
    lights = np.full((1, STEPS), LightState.STOP, np.uint8)
    lights[:, 40:] = LightState.GO
    return TrafficScene.make(
        id=name, source="test", licence="ours", dt=0.1, now=NOW, origin=np.zeros(3), xy=xy, heading=heading,
        valid=valid,
        size=np.tile(np.array([4.5, 2.0, 1.6], np.float32), (agents, 1)), kind=kind, role=role,
        agent_id=np.arange(agents, dtype=np.int64) + 7,
        points=np.concatenate(pieces).astype(np.float32), piece_start=np.array([0, 41, 82, 123], np.int32),
        piece_kind=np.array([PieceKind.LANE, PieceKind.LANE, PieceKind.ROAD_EDGE], np.uint8),
        piece_subtype=np.array([2, 2, 1], np.uint8), piece_closed=np.zeros(3, bool),
        piece_id=np.arange(3, dtype=np.int64), speed_limit=np.full(3, np.nan, np.float32),
        edges=np.empty((0, 2), np.int32), edge_kind=np.empty(0, np.uint8), has_lights=True,
        light_piece=np.array([0], np.int32), light_stop=np.array([[20.0, 0.0]]), light_state=lights,
    )  # fmt: skip


def tiny_network(geometry: str = "relative", seed: int = 0) -> tuple[NextTokenNetwork, VerletVocabulary]:
    vocabulary = VerletVocabulary()
    torch.manual_seed(seed)
    latents = 8 if geometry == "scene" else 0
    # Pieces are 5 m long: rounding would decide who is seen at a radius of 10 m, or among equally far ones.
    settings = NetworkSettings(
        vocabulary.size, geometry, width=16, heads=2, blocks=2, latents=latents,
        near_pieces=64, near_map=64, radius_pieces=11.3, radius_map=31.7,
    )  # fmt: skip
    return NextTokenNetwork(settings, vocabulary).eval(), vocabulary
