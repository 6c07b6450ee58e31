"""A panel of graded planners for the ego, to be ranked: 10 IDM drivers and 10 Frenet planners.

The ranges are those that SPACeR names (v0 15 ... 40 m/s, s0 1.5 ... 4 m, T 0.8 ... 2.5 s, aggressiveness 0.1 ... 0.9;
lateral weights 5 ... 100, collision term off, high speed, short horizon). Aggressiveness g is ours: a_max = 1 + 2 g,
b = 1.5 + 2.5 g [m/s^2]. The order is from cautious to reckless within each family.
"""

from __future__ import annotations

from navsim_ext.closed_loop.policies.frenet import Frenet, FrenetParameters
from navsim_ext.closed_loop.policies.idm import Idm, IdmParameters
from navsim_ext.closed_loop.policy import AgentPolicy
from navsim_ext.errors import DataError

IDM_DRIVERS = 10


def _idm(k: int, path: str) -> Idm:
    u = k / (IDM_DRIVERS - 1)
    g = 0.1 + 0.8 * u
    parameters = IdmParameters(
        desired_speed=15.0 + 25.0 * u,
        headway=2.5 - 1.7 * u,
        standstill=4.0 - 2.5 * u,
        acceleration=1.0 + 2.0 * g,
        braking=1.5 + 2.5 * g,
    )
    return Idm(path, parameters, name=f"idm_{k}")


FRENET = (
    FrenetParameters(lateral_weight=100.0),
    FrenetParameters(lateral_weight=50.0),
    FrenetParameters(lateral_weight=20.0),
    FrenetParameters(lateral_weight=10.0),
    FrenetParameters(lateral_weight=5.0),
    FrenetParameters(margin=0.0),
    FrenetParameters(horizon_s=1.0),
    FrenetParameters(desired_speed=20.0),
    FrenetParameters(desired_speed=20.0, horizon_s=1.0),
    FrenetParameters(collision_weight=0.0),
)
NAMES = tuple(f"idm_{k}" for k in range(IDM_DRIVERS)) + tuple(f"frenet_{k}" for k in range(len(FRENET)))


def panel(path: str = "log") -> list[AgentPolicy]:
    """All twenty."""
    return [member(name, path) for name in NAMES]


def member(name: str, path: str = "log") -> AgentPolicy:
    """One of :data:`NAMES`; raises DataError for another name."""
    if name not in NAMES:
        raise DataError(f"the panel has no planner {name!r}; it has {', '.join(NAMES)}")
    family, _, number = name.partition("_")
    return _idm(int(number), path) if family == "idm" else Frenet(path, FRENET[int(number)], name=name)
