"""Seconds a scenario of the sim-agents metrics, beside the times that the challenge's own code took on the same scenes.

    TRIVIUM_REFERENCE_DATA=<folder> python benchmarks/bench_realism.py --output benchmarks/results/realism.json

golden/wosac in the reference data holds 13 scenes with rollouts and the original's times (features and metrics, CPU
seconds, on another machine); without it the three committed scenes are scored, which have no times. real/womd holds
recorded scenes: 32 rollouts of three baselines are scored on them, for speed and as figures. One core; the least
CPU time of --repeats counts, compilation does not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

import numpy as np
from environment import report, row

from navsim_ext.realism.metric import Realism, realism
from navsim_ext.realism.rollouts import RolloutFolder, Rollouts
from navsim_ext.realism.rules import CHALLENGE_ROLLOUTS, FUTURE_STEPS, HISTORY_STEPS, PRESENT, STEP_SECONDS
from navsim_ext.realism.scene_folder import SceneFolder
from navsim_ext.traffic.scene import TrafficScene
from navsim_ext.traffic.scene_v1 import read_scenes

COMMITTED = Path(__file__).parents[1] / "tests" / "golden" / "wosac"
BASELINE = "waymo-open-dataset 1.6.7 (TensorFlow 2.13 CPU) on the same scenes, as recorded in their metrics.json"


def timed(scene: TrafficScene, rollouts: Rollouts, repeats: int) -> tuple[Realism, float]:
    """Figures and least CPU seconds."""
    result, seconds = realism(scene, rollouts), []
    for _ in range(repeats):
        start = time.process_time()
        realism(scene, rollouts)
        seconds.append(time.process_time() - start)
    return result, min(seconds)


def simulated(scene: TrafficScene) -> np.ndarray:
    return np.flatnonzero(scene.valid[:, PRESENT])


def standing(scene: TrafficScene) -> Rollouts:
    rows = simulated(scene)
    pose = np.concatenate([scene.pose[rows, PRESENT, :2], scene.heading_as_recorded[rows, PRESENT, None]], axis=-1)
    return Rollouts(scene.agent_id[rows], np.tile(pose[None, :, None], (CHALLENGE_ROLLOUTS, 1, FUTURE_STEPS, 1)))


def constant_velocity(scene: TrafficScene) -> Rollouts:
    rollouts = standing(scene)
    rows = simulated(scene)
    velocity = np.zeros((len(rows), 2))
    known = scene.valid[rows, PRESENT - 1]
    step = scene.pose[rows, PRESENT, :2].astype(float) - scene.pose[rows, PRESENT - 1, :2]
    velocity[known] = step[known] / STEP_SECONDS
    ahead = np.arange(1, FUTURE_STEPS + 1)[:, None] * STEP_SECONDS
    rollouts.pose[..., :2] += (velocity[:, None] * ahead).astype(np.float32)
    return rollouts


def log_replay(scene: TrafficScene) -> Rollouts:
    """The recording, gaps filled by straight lines and ends held: what the rules take for a rollout."""
    rows = simulated(scene)
    steps = np.arange(scene.num_steps)
    pose = np.empty((len(rows), FUTURE_STEPS, 3), np.float32)
    for place, one in enumerate(rows):
        known = scene.valid[one]
        for axis, values in enumerate((scene.pose[one, :, 0], scene.pose[one, :, 1], scene.pose[one, :, 2])):
            pose[place, :, axis] = np.interp(steps, steps[known], values[known])[HISTORY_STEPS:]
    return Rollouts(scene.agent_id[rows], np.repeat(pose[None], CHALLENGE_ROLLOUTS, axis=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    reference = Path(os.environ.get("TRIVIUM_REFERENCE_DATA", ""))
    golden, recorded = reference / "golden" / "wosac", reference / "real" / "womd"
    folder = golden if golden.is_dir() else COMMITTED
    scenes, rollouts = SceneFolder(str(folder)), RolloutFolder(folder)
    known = json.loads((folder / "metrics.json").read_text()).get("times", {})
    seconds, ratios = [], []
    for name in scenes.names:
        _, least = timed(scenes.get(name), rollouts.get(name), arguments.repeats)
        seconds.append(least)
        if name in known:
            ratios.append((known[name]["features_s"] + known[name]["metrics_s"]) / least)
    rows = [
        row(f"synthetic scenario, median of {len(seconds)}", float(np.median(seconds)), "s", "<= 0.25"),
        row("synthetic scenario, slowest", max(seconds), "s", "<= 0.25"),
    ]
    if ratios:
        rows.append(row("the original's time over ours, median", float(np.median(ratios)), "x"))
    if recorded.is_dir():
        real = list(read_scenes(recorded))
        slowest = max(timed(scene, constant_velocity(scene), arguments.repeats)[1] for scene in real)
        most = max(len(simulated(scene)) for scene in real)
        rows.append(row(f"real scenario (up to {most} objects), slowest of {len(real)}", slowest, "s", "<= 2"))
        baselines = {"log replay": log_replay, "constant velocity": constant_velocity, "standing": standing}
        for name, make in baselines.items():
            found = [realism(scene, make(scene)).metrics for scene in real]
            shown = (("metametric", "meta-metric of 2025", ""), ("average_displacement_error", "ADE", "m"))
            for key, told, unit in shown:
                mean = float(np.mean([one[key] for one in found]))
                rows.append(row(f"{len(real)} real scenes, {name}: {told}", mean, unit))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows.append(row("peak memory of the process", memory, "MB", "<= 500"))
    report("realism", rows, baseline=BASELINE, output=arguments.output)


if __name__ == "__main__":
    main()
