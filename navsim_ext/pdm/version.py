"""Which scorer this is: the fields that caches and score files carry so that they are never mixed."""

from __future__ import annotations

from typing import Any

from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint

VERSIONS = ("v1", "v2")  # of NAVSIM's scorer, in the order of all arrays that hold both
SCORER_VERSION = 1  # raise whenever any score may change
NAVSIM_VERSIONS = {"v1": "NAVSIM 1.1 (3e8291b)", "v2": "NAVSIM 2.2 (0a380a9)"}


TRAFFIC_POLICIES = ("log_replay", "reactive", "constant_velocity")  # what the other road users do while it is scored


def require_traffic(traffic: str) -> str:
    """Returns the name of a traffic policy; raises DataError naming those that exist."""
    if traffic not in TRAFFIC_POLICIES:
        raise DataError(f"traffic={traffic!r}: one of {', '.join(TRAFFIC_POLICIES)} was expected")
    return traffic


def scorer_fields(traffic: str = "log_replay") -> dict[str, Any]:
    """Identity of the scorer: its version, what it reproduces, the vehicle and the traffic it assumes."""
    require_traffic(traffic)
    return {"version": SCORER_VERSION, "reproduces": NAVSIM_VERSIONS, "vehicle": "pacifica", "traffic": traffic}


def scorer_fingerprint(traffic: str = "log_replay") -> Fingerprint:
    """The scorer as a parent of score files and of checkpoints that were trained on its reward."""
    return Fingerprint(kind="pdm_scorer", fields=scorer_fields(traffic))
