"""Scenes with a lane, a leader, a light and neighbours for tests of the ego's planners, and a store of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from closed_loop_worlds import Car, road

from navsim_ext.closed_loop.world import World
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.store import fingerprint_of, write_scenes


def street(seed: int = 0, *, move=(0.0, 0.0, 0.0), id: str | None = None, others: int = 6) -> TrafficScene:
    """An ego on the lane y = -1.75 that drives on (or brakes), and others around it."""
    rng = np.random.default_rng(seed)
    cars = [Car(0.0, -1.75, 0.0, float(rng.uniform(4, 9)), float(rng.uniform(-0.6, 0.6)))]
    cars += [
        Car(float(rng.uniform(-40, 60)), float(rng.choice([-5.25, 1.75])), float(rng.uniform(-0.1, 0.1)),
            float(rng.uniform(0, 8)), kind=int(rng.integers(0, 3)))
        for _ in range(others)
    ]  # fmt: skip
    return road(cars, red=True, move=move, id=id or f"street-{seed}")


def permuted(scene: TrafficScene, order: np.ndarray) -> TrafficScene:
    """The same scene with its road users in another order."""
    names = ("pose", "speed", "valid", "size", "kind", "role", "agent_id", "z", "source_heading", "goal")
    values = {name: getattr(scene, name)[order] for name in names if getattr(scene, name) is not None}
    return replace(scene, **values).validate()


def reset(*scenes: TrafficScene, horizon_s: float = 4.0, rollouts: int = 1):
    world = World(horizon_s=horizon_s, rollouts=rollouts)
    return world, world.reset(list(scenes))


def store(folder, count: int = 6) -> str:
    write_scenes(folder, (street(seed) for seed in range(count)), fingerprint_of({"test": "ego"}))
    return str(folder)


def close(one, other, atol=2e-4) -> None:
    """Equal observations, part by part."""
    for name in vars(one):
        a, b = getattr(one, name), getattr(other, name)
        if a.dtype == torch.bool:
            assert torch.equal(a, b), name
        else:
            torch.testing.assert_close(a, b, atol=atol, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
