"""What stands between the base's parts, against references written out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from navsim_ext.bootstrap import REPLICATES, bootstrap_mean
from navsim_ext.evaluation.compare import compare
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache.source import states_fingerprint
from navsim_ext.runtime.checkpoint_folder import resume_point
from navsim_ext.runtime.checkpoints import resumable_after
from navsim_ext.runtime.csv_log import CsvLog


def test_replicates_pool_the_values_of_the_drawn_logs():
    """Logs of unequal length: each replicate is the mean of the values themselves, not of the means of logs."""
    names, lengths = "abcdefgh", (1, 2, 30, 4, 9, 1, 50, 3)
    logs = [name for name, length in zip(names, lengths) for _ in range(length)]
    values = np.random.default_rng(7).random(len(logs)) + np.repeat(np.arange(8.0), lengths)
    drawn = np.random.default_rng(0).multinomial(8, np.full(8, 1 / 8), size=REPLICATES)
    of_log = [values[np.array(logs) == name] for name in names]
    pooled = [np.concatenate([np.repeat(*pair) for pair in zip(of_log, row)]).mean() for row in drawn]
    estimate = bootstrap_mean(values, logs)
    assert estimate.mean == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(pooled, [0.025, 0.975])))
    assert (estimate.count, estimate.logs) == (100, 8)


def test_every_setting_that_changes_states_is_in_their_fingerprint():
    vlm = Fingerprint("vlm", {"weights": 1})
    digests = {
        states_fingerprint(made_by, codec=codec, pooling=pooling, pad_to=pad_to).digest
        for made_by in (vlm, Fingerprint("vlm", {"weights": 2}))
        for codec in ("bf16", "int8_token")
        for pooling, pad_to in ((None, None), ("image_2x2", None), (None, 2800), (None, 2801))
    }
    assert len(digests) == 16


def scores(name: str, values: list[float], valid: list[bool]) -> pd.DataFrame:
    return pd.DataFrame({"token": list("abc"), "name": name, "log_name": ["x", "x", "y"], "valid": valid,
                         "pdms_v1": values, "v1_nc": 1.0, "v1_dac": 1.0, "v1_ep": values, "v1_ttc": values,
                         "v1_comfort": values})  # fmt: skip


def test_a_comparison_is_b_minus_a_over_tokens_valid_in_both():
    told = compare(scores("a", [0.1, 0.2, 0.9], [True, True, False]), scores("b", [0.3, 0.6, 0.0], [True, True, True]))
    assert told.differences["pdms_v1"].mean == pytest.approx(0.3)
    assert (len(told.pairs), told.dropped_invalid) == (2, 1)
    assert told.pairs["pdms_v1_change"].tolist() == pytest.approx([0.2, 0.4])


@pytest.mark.parametrize(("batch", "val_every", "whole_epochs", "expected"), [
    (0, 0, True, False), (1, 0, True, True), (9, 0, True, False), (3, 4, True, False), (5, 4, True, True),
    (1, 4, False, False), (3, 4, False, True),
])  # fmt: skip
def test_a_checkpoint_is_taken_where_it_continues_exactly(batch, val_every, whole_epochs, expected):
    """Of ten batches with two accumulated; ``total_batch_idx`` runs over epochs (two batches before this one)."""
    trainer = SimpleNamespace(num_training_batches=10, accumulate_grad_batches=2, val_check_batch=val_every,
                              check_val_every_n_epoch=1 if whole_epochs else None,
                              fit_loop=SimpleNamespace(total_batch_idx=batch + 2))  # fmt: skip
    assert resumable_after(trainer, batch) == expected


def test_a_run_continues_where_last_points(tmp_path):
    import zipfile

    for step in (4, 8):
        with zipfile.ZipFile(tmp_path / f"epoch=0-step={step}.ckpt", "w") as archive:
            archive.writestr("x", "y")
    assert resume_point(tmp_path).name == "epoch=0-step=8.ckpt"  # no link: the newest
    (tmp_path / "last.ckpt").symlink_to("epoch=0-step=4.ckpt")
    assert resume_point(tmp_path).name == "epoch=0-step=4.ckpt"  # the newer one was never committed
    (tmp_path / "epoch=0-step=4.ckpt").write_bytes(b"cut")
    assert resume_point(tmp_path).name == "epoch=0-step=8.ckpt"


def test_a_table_is_cut_back_to_what_a_checkpoint_holds(tmp_path):
    table = CsvLog(tmp_path / "t.csv")
    for step in range(5):
        table.write({"step": step, "x": step * 10})
    table.truncate(3)
    kept = [(row["step"], row["x"]) for row in CsvLog(tmp_path / "t.csv").read()]
    assert kept == [("0", "0"), ("1", "10"), ("2", "20")]
    again = CsvLog(tmp_path / "t.csv")
    again.write({"step": 2, "x": 99})  # a replay
    again.write({"step": 3, "x": 31})
    assert [row["x"] for row in again.read()] == ["0", "10", "20", "31"]
    alarms = CsvLog(tmp_path / "a.csv", identified_by=("step", "alarm"))
    alarms.begin(["step", "alarm"])
    for name in ("one", "two", "one"):
        alarms.write({"step": 7, "alarm": name})
    assert [row["alarm"] for row in alarms.read()] == ["one", "two"]
