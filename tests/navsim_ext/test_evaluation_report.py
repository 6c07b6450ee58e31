"""The report as a browser sees it, and comparison and tables on score tables with known content."""

import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from damage import judge_damage

from navsim_ext.errors import DataError
from navsim_ext.evaluation.attribution import EPDMS_V2_NOFILTER, PDMS_V1
from navsim_ext.evaluation.compare import compare
from navsim_ext.evaluation.glossary import TERMS, meaning
from navsim_ext.evaluation.report import build_report, load_folders, why_zero
from navsim_ext.evaluation.report_figures import curves_plot
from navsim_ext.evaluation.table import COLUMNS, identity, identity_line, print_table, summarise
from navsim_ext.fingerprint import Fingerprint, FingerprintMismatch
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.parquet import write_table

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def make_scores(name: str, quality: float, seed: int = 0, logs: int = 6) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    count = logs * 5
    table = pd.DataFrame(
        {"token": [f"{i:016x}" for i in range(count)], "name": name, "log_name": [f"log{i // 5}" for i in range(count)]}
    )
    for formula in (PDMS_V1, EPDMS_V2_NOFILTER):
        columns = {term: (rng.random(count) < quality).astype(float) for term in formula.terms}
        for term, values in columns.items():
            table[term] = values
        table[formula.name] = formula(columns)
    table["v1_ddc"] = 1.0
    table["epdms_v2"] = table["epdms_v2_nofilter"]
    table["valid"], table["reason"], table["map_label"] = True, "", "nuplan"
    return table


def save(folder, table: pd.DataFrame, scorer_version: str = "1") -> str:
    folder.mkdir()
    write_table(folder / "scores.parquet", table)
    poses = [np.column_stack([np.arange(1, 9) * 2.0, np.zeros(8), np.zeros(8)]).ravel()] * len(table)
    rows = pd.DataFrame({"token": table["token"], "name": table["name"], "poses": poses})
    write_table(folder / "trajectories.parquet", rows)
    scorer = Fingerprint("scorer", {"version": scorer_version})
    Fingerprint("scores", {"planner": table["name"][0]}, {"scorer": scorer}).save(folder)
    return str(folder)


def test_comparison_pairs_by_token_and_counts_what_it_leaves_out():
    a, b = make_scores("a", 0.6, 1), make_scores("b", 0.9, 2)
    b = b.sample(frac=1.0, random_state=0).iloc[:-2].reset_index(drop=True)  # other order, two tokens fewer
    a.loc[a["token"] == b["token"][0], "valid"] = False
    result = compare(a, b)
    joined = a.merge(b, on="token")
    joined = joined[joined["valid_x"]]
    expected = (joined["pdms_v1_y"] - joined["pdms_v1_x"]).mean()
    assert result.differences["pdms_v1"].mean == pytest.approx(expected)
    assert sum(share.mean for share in result.waterfall["pdms_v1"].values()) == pytest.approx(expected)
    assert (result.only_a, result.only_b, result.dropped_invalid) == (2, 0, 1)


def test_a_token_twice_or_two_planners_are_refused():
    a = make_scores("a", 0.5)
    with pytest.raises(DataError, match="twice"):
        compare(pd.concat([a, a.iloc[:1]]), a)
    with pytest.raises(DataError, match="choose one"):
        compare(pd.concat([a, make_scores("b", 0.5)]), a)


def test_invalid_rows_enter_no_mean_and_are_counted():
    table = make_scores("a", 1.0)
    table.loc[0, ["valid", "pdms_v1"]] = [False, np.nan]
    table.loc[1:, "pdms_v1"] = 1.0
    assert summarise(table)["a"]["pdms_v1"].mean == 1.0
    what = identity(table, split="navtest")
    assert what["invalid"] == {"a": 1}
    assert "30 tokens in 6 logs" in identity_line(what)


def test_approx_maps_are_said_in_every_place():
    table = make_scores("a", 1.0)
    table["map_label"] = "approx"
    what = identity(table)
    assert "approx" in identity_line(what)
    assert "approx" in print_table(summarise(table), what)[0].title


def test_two_scorers_are_not_put_in_one_table(tmp_path):
    folders = [save(tmp_path / "a", make_scores("a", 0.5)), save(tmp_path / "b", make_scores("b", 0.5), "2")]
    with pytest.raises(FingerprintMismatch, match=r"version: '1' \| '2'"):
        load_folders(folders)


def test_no_damage_of_a_score_folder_changes_a_table_in_silence(tmp_path):
    folder = tmp_path / "a"
    save(folder, make_scores("a", 0.5))

    def read():
        scores, trajectories, made = load_folders([str(folder)])
        values = [table.drop(columns="poses", errors="ignore").to_json() for table in (scores, trajectories)]
        return [*values, np.stack(trajectories["poses"].tolist()).tobytes(), made["a"].digest]

    verdicts = judge_damage(folder, read, np.random.default_rng(0), 40)
    assert verdicts["scores.parquet"] == verdicts["trajectories.parquet"] == {"named": 40, "without effect": 0}


def test_every_column_of_a_table_and_every_abbreviation_of_a_sentence_is_explained():
    assert {meaning(column) for column in COLUMNS} <= set(TERMS.values())
    spoken = {word for sentence in TERMS.values() for word in re.findall(r"\b(?!NAVSIM|PDM-)[A-Z]{1,5}\b", sentence)}
    assert spoken - {"PDM", "A"} <= set(TERMS)


def test_a_caption_says_which_gates_make_a_score_zero():
    row = pd.Series({"pdms_v1": 0.0, "v1_nc": 0.0, "v1_dac": 1.0, "epdms_v2": 0.0, "v2_nc": 1.0, "v2_dac": 0.0,
                     "v2_ddc": 0.5, "v2_tlc": 0.0})  # fmt: skip
    assert why_zero("pdms_v1", row) == " (NC 0)"
    assert why_zero("epdms_v2", row) == " (DAC 0, TLC 0)"
    assert why_zero("pdms_v1", pd.Series({"pdms_v1": 0.3, "v1_nc": 0.5, "v1_dac": 1.0})) == ""


def test_curves_name_their_axis_and_smooth_only_what_is_long():
    table = pd.DataFrame({"step": np.arange(200), "train/loss": np.arange(200.0), "val/ade": np.nan})
    table.loc[[50, 100, 150, 199], "val/ade"] = 1.0
    figure = curves_plot(table, ["train/loss", "val/ade"], "step")
    long, few = figure.axes
    assert (len(long.lines), len(few.lines)) == (2, 1)
    assert [axes.get_xlabel() for axes in (long, few)] == ["step", "step"]
    assert few.get_title(loc="left") == "val/ade [m]"
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend == ["as measured", "running mean over 1/40 of the rows"]
    np.testing.assert_allclose(long.lines[1].get_ydata()[-1], np.arange(195, 200).mean())


@pytest.fixture(scope="module")
def report(tmp_path_factory, request):
    """A report over two planners with everything but the gallery (which needs scenes)."""
    root = tmp_path_factory.mktemp("report")
    a = save(root / "il", make_scores("diffusion_il", 0.7, 1))
    b = save(root / "rl", make_scores("diffusion_rl", 0.9, 2))
    run = root / "run"
    run.mkdir()
    steps = np.arange(40)
    pd.DataFrame({"step": steps, "train/loss": np.exp(-steps / 10)}).to_csv(run / "metrics.csv", index=False)
    for name, column in (("rewards", "reward"), ("kl_divergence", "kl"), ("advantages", "spread")):
        pd.DataFrame({"step": steps, column: steps / 40}).to_csv(run / f"{name}.csv", index=False)
    (run / "alarms.csv").write_text(
        "step,rollout,alarm,action,cause,value,bc_boost\n7,3,reverse_tail,warn,<script>alert(1)</script>,0.25,0.0\n"
    )
    overrides = [
        f"output_dir={root}", f"scores=[{a},{b}]", "comparisons=[[diffusion_il,diffusion_rl]]", "gallery.count=0",
        f"training=[{{title: Stage 2, folder: {run}, columns: null}}]", f"recorder.folder={run}",
        "recorder.columns=null", "data.split=test",
    ]  # fmt: skip
    return build_report(compose("report", overrides))


def test_report_is_self_contained_and_escapes_what_it_shows(report):
    html = report.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert "<script" not in html
    assert "step 7: reverse_tail (&lt;script&gt;alert(1)&lt;/script&gt;, value 0.25): warn" in html
    assert html.count('src="data:image/') == 5  # scores, two waterfalls, one training run, flight recorder
    for text in ("diffusion_rl", "PDMS v1.1", "30 tokens in 6 logs", "Paired difference"):
        assert text in html


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH: the report was not opened in a browser")
@pytest.mark.parametrize("width", [1280, 390])
def test_report_in_a_browser_loads_every_image_and_does_not_overflow(report, tmp_path, width):
    probe = """<pre id=probe></pre><script>addEventListener('load', () => {
      const images = [...document.images];
      document.getElementById('probe').textContent = JSON.stringify({
        broken: images.filter(i => !i.complete || i.naturalWidth === 0).length, images: images.length,
        overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth});
    });</script></body>"""
    page = tmp_path / "probe.html"
    page.write_text(report.read_text().replace("</body>", probe))
    result = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="probe">(.*?)</pre>', result.stdout)
    assert found, result.stderr[-2000:]
    assert found[1] == '{"broken":0,"images":5,"overflow":0}'
