"""Recorded and generated traffic: all road users, the map and the lights of a scene, from any source. See README.md."""

from navsim_ext.traffic.codes import AgentKind, EdgeKind, LightState, PieceKind, Role
from navsim_ext.traffic.scene import TrafficScene

__all__ = ["AgentKind", "EdgeKind", "LightState", "PieceKind", "Role", "TrafficScene"]
