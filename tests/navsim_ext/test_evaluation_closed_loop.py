"""Rankings against scipy and by hand; drives as score tables; open and closed loop side by side."""

from __future__ import annotations

import base64
import dataclasses
import io
import sys

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from navsim_ext.bootstrap import Estimate
from navsim_ext.closed_loop import score
from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation import closed_loop, compare, drives, report_drives
from navsim_ext.evaluation.ranking import agreement, discordant, kendall, spearman
from navsim_ext.fingerprint import Fingerprint, FingerprintMismatch
from navsim_ext.runtime.parquet import write_table
from navsim_ext.traffic.store import fingerprint_of, write_scenes
from tests.navsim_ext.closed_loop_worlds import Car, road


@pytest.mark.parametrize("seed", range(4))
def test_rank_correlations_are_those_of_scipy_with_ties(seed):
    random = np.random.default_rng(seed)
    a, b = random.integers(0, 6, (2, 5, 9)).astype(float)
    for x, y, r, tau in zip(a, b, spearman(a, b), kendall(a, b)):
        assert r == pytest.approx(stats.spearmanr(x, y).statistic)
        assert tau == pytest.approx(stats.kendalltau(x, y).statistic)
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))
    assert np.isnan(kendall(np.ones(4), np.arange(4.0)))


def test_equal_means_of_numbers_in_another_order_are_ties():
    a = np.array([np.mean([0.1, 0.2, 0.3]), np.mean([0.3, 0.2, 0.1]), 1.0])
    assert spearman(a, np.array([0.0, 0.0, 1.0])) == pytest.approx(1.0)
    assert discordant(np.array([3.0, 2.0, 1.0]), np.array([2.0, 3.0, 1.0])) == [(0, 1)]


def test_agreement_of_a_faithful_a_noisy_and_a_reversed_judge():
    random = np.random.default_rng(0)
    truth = np.linspace(0.2, 0.9, 8)[:, None] + 0.05 * random.normal(size=(8, 60))
    noisy = truth + 0.6 * random.normal(size=truth.shape)
    found = agreement({"same": truth, "noisy": noisy, "reversed": 1.0 - truth}, truth)
    assert found.values["same"]["spearman"].mean == 1.0
    assert found.values["same"]["error"].mean == 0.0
    assert found.values["reversed"]["kendall"].mean == -1.0
    difference = found.differences["reversed", "same"]["spearman"]
    assert difference.mean == -2.0
    assert difference.high < 0.0
    assert found.values["noisy"]["spearman"].low <= found.values["noisy"]["spearman"].mean
    # paired draws: a judge that is the other plus a constant for all has no uncertain difference
    twin = agreement({"a": noisy, "b": noisy + 0.25}, truth).differences["b", "a"]["spearman"]
    assert (twin.low, twin.high) == (0.0, 0.0)
    with pytest.raises(DataError, match="at least 3 planners"):
        agreement({"a": truth[:2]}, truth[:2])
    with pytest.raises(DataError, match="scores of a"):
        agreement({"a": np.where(truth > 0.9, np.nan, truth)}, truth)


def write(folder, name, scores, *, agents="replay", horizon=15.0, invalid=()):
    folder.mkdir(parents=True)
    count = len(scores)
    rows = pd.DataFrame({"id": [f"s{k}" for k in range(count)], "planner": name, "agents": agents, "reason": ""})
    rows["valid"] = [k not in invalid for k in range(count)]
    for column in score.COLUMNS:
        rows[column] = 1.0
    rows["tlc"] = np.nan  # scenes without lights
    rows["ep"], rows["clean"] = np.asarray(scores), 1.0
    rows["score"] = score.combine({column: rows[column].to_numpy(float) for column in score.COLUMNS})
    write_table(folder / drives.SCORES_FILE, rows)
    fields = {"planner": name, "agents": {"_target_": agents}, "horizon_s": horizon}
    Fingerprint(drives.KIND, fields, {"score": score.fingerprint()}).save(folder)
    return folder


def test_compare_understands_drives_and_refuses_other_traffic(tmp_path):
    a = write(tmp_path / "a", "slow", np.full(12, 0.4), invalid=(3,))
    b = write(tmp_path / "b", "fast", np.full(12, 1.0))
    other = write(tmp_path / "c", "fast", np.full(12, 1.0), agents="law")
    (rows_a, name_a, made_a), (rows_b, name_b, made_b) = compare.select(str(a), None), compare.select(str(b), None)
    _, _, made_c = compare.select(str(other), None)
    found = compare.compare(rows_a, rows_b)
    change, shares = found.differences["score"], found.waterfall["score"]
    assert change.mean == pytest.approx(5 * 0.6 / 12)
    assert change.count == 11
    assert shares["ep"].mean == pytest.approx(change.mean)
    assert sum(share.mean for share in shares.values()) == pytest.approx(change.mean)
    console = Console(width=80, record=True, file=io.StringIO())
    compare.print_comparison(console, found, (name_a, name_b), 3)
    assert "closed-loop score" in console.export_text()
    made_a.parents["scorer"].require_equal(made_b.parents["scorer"], mine="a", theirs="b", remedy="-")
    with pytest.raises(FingerprintMismatch):
        made_a.parents["scorer"].require_equal(made_c.parents["scorer"], mine="a", theirs="c", remedy="-")


def test_open_and_closed_loop_side_by_side(tmp_path):
    random = np.random.default_rng(1)
    base = random.uniform(0.3, 0.6, 40)
    for agents in ("replay", "law"):
        for name, gain in (("a", 0.0), ("b", 0.1), ("c", 0.3)):
            write(tmp_path / agents / name, name, base + gain, agents=agents)
    found, _ = closed_loop.read_all([str(tmp_path / agents / name) for agents in ("replay", "law") for name in "abc"])
    assert {traffic: list(rows) for traffic, rows in found.items()} == {"replay": list("abc"), "law": list("abc")}
    estimate = lambda mean: Estimate(mean, mean, mean, 9, 9)  # noqa: E731
    opened = {"a": estimate(0.2), "b": estimate(0.4), "c": estimate(0.9)}
    holds = closed_loop.judge(found["law"], opened, [["a", "b"]])
    assert closed_loop.verdict(holds["order"]) == "The order of open loop holds in closed loop."
    assert holds["differences"]["b - a"]["score"].mean == pytest.approx(0.1 * 5 / 12)
    opened["b"] = estimate(0.95)
    swapped = closed_loop.judge(found["law"], opened, [])
    assert [one["better_closed"] for one in swapped["order"]["score"]["swapped"]] == ["c"]
    assert "All planners have the same" in closed_loop.verdict(swapped["order"], "clean")
    assert "does not hold: closed loop puts c over b, beyond its interval" in closed_loop.verdict(swapped["order"])
    with pytest.raises(DataError, match="who did not drive"):
        closed_loop.judge(found["law"], opened, [["a", "nobody"]])
    with pytest.raises(MissingError, match="no finished drives"):
        drives.read_drives(tmp_path)
    longer = write(tmp_path / "longer", "d", base, horizon=8.0)
    with pytest.raises(FingerprintMismatch):
        closed_loop.read_all([str(tmp_path / "law" / "a"), str(longer)])
    with pytest.raises(DataError, match="twice"):
        closed_loop.read_all([str(tmp_path / "law" / "a"), str(tmp_path / "law" / "a")])


def test_drives_in_the_report_are_tables_and_films_with_a_slider(tmp_path, monkeypatch):
    slow = road([Car(0, -1.75, speed=5)], id="s0", half_length=80.0, steps=31)
    folders = []
    for name, values in (("a", [0.2, 0.9]), ("b", [0.8, 0.9])):
        folder = write(tmp_path / name, name, values)
        scenes = [dataclasses.replace(slow, id=f"s{k}") for k in range(2)]
        write_scenes(folder / "drives", iter(scenes), fingerprint_of({"driven": name}))
        folders.append(str(folder))
    options = {"count": 1, "every": 5, "height": 64, "cameras": None}
    found = report_drives.drive_sections(folders, options)
    assert [section["title"] for section in found["films"]] == ["s0"]  # where the two differ most
    films = found["films"][0]["drives"]
    assert [film["caption"].split(":")[0] for film in films] == ["a among replay", "b among replay"]
    content = base64.b64decode(films[0]["uri"].split(",")[1])
    assert films[0]["video"]
    assert content[4:8] == b"ftyp"
    assert [row["name"] for row in found["tables"][0]["rows"]] == ["a", "b"]
    assert report_drives.drive_sections([], options) is None
    assert report_drives.chosen_scenes([drives.read_drives(folders[0])[0]], 2) == ["s0", "s1"]
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    gif = report_drives.film_uri(iter([np.zeros((64, 64, 3), np.uint8)] * 2), 2.0)
    assert gif["uri"].startswith("data:image/gif")
    assert not gif["video"]
