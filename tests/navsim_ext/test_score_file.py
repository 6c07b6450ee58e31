"""Score files: the columns promised, parity, two-frame pairs by name, bad files and bad rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.core.global_hydra import GlobalHydra

from navsim_ext.errors import CorruptFile, DataError, MissingError
from navsim_ext.evaluation import score_file as job
from navsim_ext.evaluation.compare import compare, select
from navsim_ext.evaluation.report import load_folders
from navsim_ext.evaluation.show import grouped
from navsim_ext.evaluation.table import read_scores
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.metric_cache.schema import KIND, MetricCache, cache_fields, map_folder
from navsim_ext.pdm import score_pairs
from navsim_ext.pdm.memory import MemoryMetricCache
from navsim_ext.shards import ShardWriter

GOLDEN = Path(__file__).parents[1] / "golden" / "pdm" / "scenes.npz"
COLUMNS = [
    "token", "name", "log_name", "valid", "reason", "map_label",
    "v1_nc", "v1_dac", "v1_ttc", "v1_ep", "v1_comfort", "v1_ddc", "pdms_v1",
    "v2_nc", "v2_dac", "v2_ddc", "v2_tlc", "v2_ep", "v2_ttc", "v2_lk", "v2_hc", "v2_ec",
    "epdms_v2_nofilter", "epdms_v2",
]  # fmt: skip


@pytest.fixture(scope="module")
def golden():
    return MemoryMetricCache.load_npz(GOLDEN)


@pytest.fixture(scope="module")
def cache_folder(golden, tmp_path_factory):
    cache, _ = golden
    folder = tmp_path_factory.mktemp("scored") / "cache"
    with ShardWriter(folder, Fingerprint(KIND, cache_fields())) as writer:
        for token in cache.tokens:
            record = cache.load(token)
            writer.put(token, record.to_arrays())
            cache.polygons(record.map_location).save(map_folder(folder, record.map_location))
    return folder


@pytest.fixture(scope="module")
def frame(golden):
    """Rows in a mixed order: three planners over all scenes."""
    cache, arrays = golden
    rows = [
        {"token": token, "name": name, "poses": arrays[f"poses/{token}"][i].ravel()}
        for i, name in enumerate(arrays[f"names/{cache.tokens[0]}"][:3])
        for token in cache.tokens
    ]
    return pd.DataFrame(rows).sample(frac=1.0, random_state=0, ignore_index=True)


def write(path, frame):
    others = [name for name in frame.columns if name != "poses"]
    columns = {name: pa.array([None if v is None or v != v else v for v in frame[name]]) for name in others}
    if "poses" in frame.columns:
        values = [None if poses is None else np.asarray(poses).tolist() for poses in frame["poses"]]
        columns["poses"] = pa.array(values, pa.list_(pa.float64()))
    pq.write_table(pa.table(columns), path)
    return path


def test_command_writes_the_promised_columns_equal_to_the_api(
    tmp_path, frame, golden, cache_folder, monkeypatch, capsys
):
    source, target = write(tmp_path / "in.parquet", frame), tmp_path / "out" / "scores.parquet"
    arguments = [f"trajectories={source}", f"metric_cache={cache_folder}", f"output={target}"]
    monkeypatch.setattr(sys, "argv", ["score_file", *arguments])
    job.main()
    GlobalHydra.instance().clear()
    assert "human" in capsys.readouterr().out
    out = pd.read_parquet(target)
    assert out.columns.tolist() == COLUMNS
    assert (out[["token", "name"]].to_numpy() == frame[["token", "name"]].to_numpy()).all()
    poses = np.stack(frame["poses"]).reshape(-1, 8, 3)
    expected = score_pairs(frame["token"].tolist(), poses, golden[0], names=frame["name"].tolist())
    for column in COLUMNS[6:]:
        np.testing.assert_array_equal(out[column], expected[column])
    assert out["v2_ec"].notna().sum() == len(frame) // 2
    metadata = pq.read_schema(target).metadata
    fingerprint = Fingerprint.from_json(json.loads(metadata[job.FINGERPRINT_KEY]))
    assert set(fingerprint.parents) == {"scorer", "metric_cache"}
    assert fingerprint.info["doctor"]["right"] is True
    summary = json.loads(metadata[job.SUMMARY_KEY])
    assert summary["planners"]["human"]["rows"] == len(golden[0])
    assert [path.name for path in target.parent.iterdir()] == ["scores.parquet"]


def test_bad_rows_are_invalid_null_and_counted(tmp_path, frame, cache_folder):
    frame = frame.head(6).copy()
    frame["poses"] = frame["poses"].astype(object)
    frame.at[0, "poses"] = frame.at[0, "poses"][:21]
    frame.at[1, "poses"] = None
    frame.at[2, "poses"] = np.where(np.arange(24) == 4, np.inf, frame.at[2, "poses"])
    frame.at[3, "token"] = "0" * 16
    cache = MetricCache(cache_folder)
    content, result = job.score_file(write(tmp_path / "in.parquet", frame), cache)
    assert result.valid.tolist() == [False, False, False, False, True, True]
    assert result.reason[0] == "poses has 21 values, 24 are needed"
    assert result.reason[1] == "poses is null"
    assert "not finite" in result.reason[2]
    assert "0" * 16 in result.reason[3]
    summary = job.summary_of(content, result)
    assert sum(entry["rows"] - entry["valid"] for entry in summary["planners"].values()) == 4
    fingerprint = job.file_fingerprint(tmp_path / "in.parquet", cache, content.tokens)
    job.write_scores(tmp_path / "out.parquet", content, result, fingerprint, summary, cache)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["pdms_v1"].null_count == 4
    assert table["reason"].to_pylist()[4:] == ["", ""]


def test_float32_and_fixed_size_lists_are_read(tmp_path, frame):
    values = np.stack(frame["poses"]).astype(np.float32)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 24)
    table = pa.table({"token": frame["token"].tolist(), "name": frame["name"].tolist(), "poses": fixed})
    pq.write_table(table, tmp_path / "in.parquet")
    content = job.read_trajectories(tmp_path / "in.parquet")
    np.testing.assert_array_equal(content.poses.reshape(-1, 24), values)
    assert content.malformed == {}


def test_bad_files_are_named(tmp_path, frame, cache_folder):
    with pytest.raises(MissingError, match=r"none\.parquet"):
        job.read_trajectories(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("token,name\n")
    with pytest.raises(CorruptFile, match=r"text\.parquet is no readable Parquet"):
        job.read_trajectories(tmp_path / "text.parquet")
    with pytest.raises(DataError, match="lacks the column 'poses'"):
        job.read_trajectories(write(tmp_path / "a.parquet", frame[["token", "name"]]))
    with pytest.raises(DataError, match="no rows"):
        job.read_trajectories(write(tmp_path / "b.parquet", frame.head(0).astype({"token": str, "name": str})))
    numbers = frame.assign(token=range(len(frame)))
    with pytest.raises(DataError, match="column token is of type int64"):
        job.read_trajectories(write(tmp_path / "c.parquet", numbers))
    nulls = frame.assign(name=[None, *frame["name"][1:]])
    with pytest.raises(DataError, match="column name has 1 nulls"):
        job.read_trajectories(write(tmp_path / "d.parquet", nulls))
    words = pa.table({"token": ["a"], "name": ["b"], "poses": ["x"]})
    pq.write_table(words, tmp_path / "e.parquet")
    with pytest.raises(DataError, match="column poses is of type string"):
        job.read_trajectories(tmp_path / "e.parquet")
    twice = pd.concat([frame.head(1)] * 2, ignore_index=True)
    with pytest.raises(DataError, match="stands twice"):
        job.score_file(write(tmp_path / "f.parquet", twice), MetricCache(cache_folder))


def run(*arguments, monkeypatch):
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["score_file", *map(str, arguments)])
    try:
        job.main()
    except SystemExit as leave:
        return leave.code
    finally:
        GlobalHydra.instance().clear()
    return 0


def test_every_form_of_output_holds_what_its_name_says(tmp_path, frame, cache_folder, monkeypatch, capsys):
    """A folder and a Parquet file are scores for compare, show and the report; another suffix is refused."""
    source = write(tmp_path / "in.parquet", frame)
    given = (f"trajectories={source}", f"metric_cache={cache_folder}")
    for output in ("one.parquet", "one.csv", "one=folder"):
        assert run(*given, f"output={tmp_path / output}", monkeypatch=monkeypatch) == 0
    assert pd.read_csv(tmp_path / "one.csv").columns.tolist() == COLUMNS
    from_file, made = read_scores(tmp_path / "one.parquet")
    from_folder, made_too = read_scores(tmp_path / "one=folder")
    pd.testing.assert_frame_equal(from_file, from_folder)
    assert made.digest == made_too.digest
    scores, trajectories, _ = load_folders([str(tmp_path / "one=folder")])
    assert len(scores) == len(trajectories) == len(frame)
    np.testing.assert_array_equal(np.stack(trajectories["poses"]), np.stack(frame["poses"]))
    names = sorted(frame["name"].unique())
    first, _, _ = select(str(tmp_path / "one.parquet"), names[0])
    second, _, _ = select(str(tmp_path / "one=folder"), names[1])
    assert compare(first, second).differences["pdms_v1"].count > 0
    ((what, summary, _),) = grouped([str(tmp_path / "one=folder")])
    assert list(summary) == list(frame["name"].drop_duplicates())
    assert what["logs"] >= 1
    with pytest.raises(DataError, match="output=FOLDER"):
        load_folders([str(tmp_path / "one.parquet")])
    assert run(*given, f"output={tmp_path / 'one.xlsx'}", monkeypatch=monkeypatch) == 2
    assert ".xlsx is not written" in capsys.readouterr().err
    with pytest.raises(MissingError, match=r"score_file wrote"):
        read_scores(tmp_path / "nowhere")


def test_nothing_valid_is_a_failure(tmp_path, frame, cache_folder, monkeypatch, capsys):
    source = write(tmp_path / "in.parquet", frame.head(3).assign(token=["x", "y", "z"]))
    given = (f"trajectories={source}", f"metric_cache={cache_folder}", f"output={tmp_path / 'out.parquet'}")
    assert run(*given, monkeypatch=monkeypatch) == 2
    assert "all 3 trajectories are invalid" in capsys.readouterr().err
    assert pq.read_table(tmp_path / "out.parquet")["valid"].to_pylist() == [False] * 3
