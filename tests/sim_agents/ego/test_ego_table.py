"""The table of planners: goals, jerk, and that only the same drives are compared."""

import numpy as np
import pandas as pd
import pytest
from closed_loop_worlds import Car, road
from ego_worlds import street

from navsim_ext.closed_loop.drive import DRIVES_FOLDER, SCORES_FILE, drive_batch
from navsim_ext.closed_loop.policies import ConstantVelocity, Idm, Replay
from navsim_ext.errors import DataError, MissingError
from navsim_ext.runtime.parquet import write_table
from navsim_ext.traffic.store import TrafficStore, fingerprint_of, write_scenes
from sim_agents.ego.table import goal_reached, mean_jerk, measure, require_same_scenes, summarise


def test_a_replayed_drive_reaches_its_goal_and_a_standing_one_does_not():
    scene = road([Car(0, -1.75, 0.0, 6.0)])
    (_, (replayed,)), (_, (driven,)) = (drive_batch([scene], one, Replay(), 8.0) for one in (Replay(), Idm()))
    assert goal_reached(replayed, scene) == 1.0
    still = road([Car(0, -1.75, 0.0, 6.0)], id="other")
    held = drive_batch([road([Car(0, -1.75)], id="still")], Replay(), Replay(), 8.0)[1][0]
    assert goal_reached(held, still) == 0.0
    assert np.isnan(goal_reached(held, road([Car(0, -1.75)], id="still")))  # nobody wants to go anywhere
    assert goal_reached(driven, scene) in (0.0, 1.0)


def test_jerk_of_a_known_motion():
    t = np.arange(41) * 0.1
    x = 5 * t + 0.5 * 2.0 * t**2 + 1.5 * t**3 / 6.0
    assert mean_jerk(np.stack([x, 0 * x], axis=-1)) == pytest.approx(1.5, abs=1e-3)
    assert mean_jerk(np.stack([5 * t, 0 * t], axis=-1)) == pytest.approx(0.0, abs=1e-6)
    assert np.isnan(mean_jerk(np.zeros((10, 2))))


def folder_of(path, planner, scenes):
    rows, drives = drive_batch(scenes, planner, Replay(), 3.0)
    write_scenes(path / DRIVES_FOLDER, iter(drives), fingerprint_of({"drives": path.name}))
    write_table(path / SCORES_FILE, pd.DataFrame([{**row, "planner": path.name, "agents": "replay"} for row in rows]))
    return path


def test_folders_of_drives_are_measured_and_only_the_same_drives_compared(tmp_path):
    scenes = [street(0), street(1)]
    write_scenes(tmp_path / "scenes", iter(scenes), fingerprint_of({"t": 1}))
    store = TrafficStore(tmp_path / "scenes")
    one = measure(folder_of(tmp_path / "idm", Idm(), scenes), store)
    other = measure(folder_of(tmp_path / "straight", ConstantVelocity(), scenes[:1]), store)
    assert one["jerk"].notna().all()
    assert summarise(one)["score"].count == 2
    require_same_scenes({"idm": one})
    with pytest.raises(DataError, match="not the same ones"):
        require_same_scenes({"idm": one, "straight": other})
    with pytest.raises(MissingError, match="drive first"):
        measure(tmp_path, store)
    write_scenes(tmp_path / "others", iter([street(7)]), fingerprint_of({"t": 2}))
    with pytest.raises(DataError, match="is not in"):
        measure(tmp_path / "idm", TrafficStore(tmp_path / "others"))
