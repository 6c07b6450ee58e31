"""Makes ``small.zip``: two logs of the reference set ``golden/navsim``, with the metric cache of their first scenes.

    TRIVIUM_REFERENCE_DATA=FOLDER python tests/golden/metric_cache/regenerate.py

The set was made by running NAVSIM 1.1 (3e8291b) and 2.2 (0a380a9) on synthetic scenes; it holds no nuPlan content.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np

LOGS = ("2021.04.13.12.03.11_veh-35_00003_00303", "2021.01.19.12.09.11_veh-35_00009_00309")  # red light, left turn
LOCATION = "us-ma-boston"
SCORE_ARRAYS = ("multi", "weighted", "multi_prod", "progress_raw")
OMITTED = ("rerun_same", "gt_future_poses10", "gt_history_poses")


def add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED, 9)


def arrays(path: Path, keep) -> bytes:
    stream = io.BytesIO()
    with np.load(path) as stored:
        np.savez(stream, **{name: stored[name] for name in stored.files if keep(name)})
    return stream.getvalue()


def main() -> None:
    source = Path(os.environ["TRIVIUM_REFERENCE_DATA"]) / "golden" / "navsim"
    index = json.loads((source / "dataset" / "index.json").read_text())
    versions = json.loads((source / "dataset" / "maps" / "nuplan-maps-v1.0.json").read_text())
    map_file = f"dataset/maps/{LOCATION}/{versions[LOCATION]['version']}/map.gpkg"
    with zipfile.ZipFile(Path(__file__).with_name("small.zip"), "w") as archive:
        add(archive, "dataset/maps/nuplan-maps-v1.0.json", json.dumps({LOCATION: versions[LOCATION]}).encode())
        add(archive, map_file, (source / map_file).read_bytes())
        for log in sorted(LOGS):
            name = f"dataset/navsim_logs/trainval/{log}.pkl"
            add(archive, name, (source / name).read_bytes())
            for token in next(entry["tokens"][:1] for entry in index["logs"] if entry["log"] == log):
                names = source / "scores" / f"{token}_trajs.npz"
                add(archive, f"scores/{names.name}", arrays(names, lambda name: name == "names"))
                for version in ("v11", "v22"):
                    file = f"{token}_{version}.npz"
                    cache = arrays(source / "metric_cache" / file, lambda name: name not in OMITTED)
                    scores = arrays(source / "scores" / file, lambda name: name in SCORE_ARRAYS)
                    add(archive, f"metric_cache/{file}", cache)
                    add(archive, f"scores/{file}", scores)


if __name__ == "__main__":
    main()
