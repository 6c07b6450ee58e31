"""Makes the committed golden PDM files from the reference set of synthetic scenes (scored by the real NAVSIM).

    TRIVIUM_REFERENCE_DATA=<folder> python tests/golden/pdm/regenerate.py

Writes ``scenes.npz`` here (eight scenes for the parity tests that always run) and ``navsim_ext/pdm/arithmetic_data/``
(two of them for the doctor, and the published 40x40 system). Only the synthetic set is used; see its README.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT / "tests" / "navsim_ext"))

from pdm_golden import GOLDEN_COLUMNS, golden_scene  # noqa: E402

from navsim_ext.pdm.memory import MemoryMetricCache  # noqa: E402

TOKENS = (
    "8b36fdcf35f5888c", "bee2abbf154c9fdf",  # static objects: NC 0.5
    "2c0600315ee8ac41", "d7bcf217173232fe",  # red light
    "2dc6e24090db9b98", "9afde09c258a257b",  # red light, a track over the ego at t = 0, pedestrian, bicycle
    "dcc0c9554d7f21e2", "8bc079f2af4e3d99",  # the human filter changes scores
)  # fmt: skip
DOCTOR_TOKENS = TOKENS[4:6]
STATE_ROWS = (0, 1, 7, 15, 22, 29)  # trajectories whose simulated states are kept


def golden_arrays(folder: Path, tokens: Sequence[str]) -> tuple[MemoryMetricCache, dict[str, np.ndarray]]:
    """Records, tables, and per token: trajectories, their names, NAVSIM's columns, simulated states of some rows."""
    v1 = pd.read_parquet(folder / "scores_v11.parquet").set_index(["token", "traj"])
    v2 = pd.read_parquet(folder / "scores_v22.parquet").set_index(["token", "traj"])
    records, tables, extra = {}, {}, {}
    for token in tokens:
        record, table = golden_scene(folder / "metric_cache", token)
        location = f"{record.map_location}-{token}"  # each golden scene has its own excerpt of the map
        records[token] = dataclasses.replace(record, map_location=location)
        tables[location] = table
        trajectories = np.load(folder / "scores" / f"{token}_trajs.npz")
        names = trajectories["names"]
        extra[f"names/{token}"] = names
        extra[f"poses/{token}"] = trajectories["poses"]
        for column, (version, source) in GOLDEN_COLUMNS.items():
            frame = (v1 if version == "v1" else v2).loc[token].loc[list(names)]
            extra[f"{column}/{token}"] = frame[source].to_numpy(np.float64)
        states = np.load(folder / "scores" / f"{token}_v11.npz")["sim_state11"]
        extra[f"states/{token}"] = states[list(STATE_ROWS)]
    extra["state_rows"] = np.array(STATE_ROWS)
    return MemoryMetricCache(records, tables), extra


def main() -> None:
    reference = Path(os.environ["TRIVIUM_REFERENCE_DATA"])
    golden = reference / "golden" / "navsim"
    doctor = ROOT / "navsim_ext" / "pdm" / "arithmetic_data"
    for path, tokens in ((HERE / "scenes.npz", TOKENS), (doctor / "scenes.npz", DOCTOR_TOKENS)):
        cache, extra = golden_arrays(golden, tokens)
        cache.save(path, **extra)
    system = reference / "real" / "lqr_solve"
    content = np.load(system / "canonical_input.npz")
    solution = json.loads((system / "high_precision_reference.json").read_text())["vector_100dps_decimal"]
    arrays = {name: content[name] for name in ("normal", "rhs", "xy_disp", "heading_prof")}
    np.savez_compressed(doctor / "lqr_system.npz", solution=np.array([float(x) for x in solution]), **arrays)
    shutil.copyfile(system / "LICENSE", doctor / "LICENSE-lqr_system")


if __name__ == "__main__":
    main()
