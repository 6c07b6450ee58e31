"""The doctor tells right from wrong arithmetic, by exit code."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console

from navsim_ext import doctor
from navsim_ext.fingerprint import digest_json
from navsim_ext.pdm import arithmetic


@pytest.fixture
def fresh_verdict():
    arithmetic.verdict.cache_clear()
    yield
    arithmetic.verdict.cache_clear()


def test_all_checks_pass_here_and_the_verdict_fits_a_fingerprint(fresh_verdict):
    findings = arithmetic.examine()
    assert [finding.name for finding in findings if not finding.right] == []
    assert len(findings) == 6
    verdict = arithmetic.verdict()
    assert verdict["right"] is True
    assert len(digest_json(verdict)) == 64
    assert arithmetic.verdict() is verdict  # once per process


def test_a_broken_pseudo_inverse_is_found(monkeypatch, fresh_verdict):
    """The published failure: initial speeds hundreds of m/s off."""
    right = np.linalg.pinv
    monkeypatch.setattr(np.linalg, "pinv", lambda matrix: 30.0 * right(matrix))
    wrong = [finding for finding in arithmetic.examine() if not finding.right]
    assert [finding.name for finding in wrong] == ["40x40 system, numpy.linalg.pinv"]
    assert "v0 = 376.0" in wrong[0].found
    with pytest.raises(arithmetic.WrongNumbers, match=r"pinv.*v0 = 376\.0"):
        arithmetic.verdict()


def test_a_solver_that_fails_is_found(monkeypatch):
    def fail(*arguments):
        raise np.linalg.LinAlgError("singular matrix")

    monkeypatch.setattr(np.linalg, "solve", fail)
    wrong = [finding for finding in arithmetic.examine() if not finding.right]
    assert [finding.found for finding in wrong] == ["failed: singular matrix"]


def test_a_wrong_own_solver_is_found(monkeypatch):
    monkeypatch.setattr(arithmetic, "fit_velocity", lambda references, velocities: velocities.fill(12.5338))
    wrong = [finding.name for finding in arithmetic.examine() if not finding.right]
    assert wrong == ["40x40 system, own banded solver"]


@pytest.mark.parametrize("column", ["pdms_v1", "v2_ec", "v1_collision_s"])
def test_scores_that_differ_are_found(monkeypatch, column):
    right = arithmetic.score_pairs

    def shifted(*arguments, **options):
        result = right(*arguments, **options)
        result[column][:] = np.nan if column == "v2_ec" else result[column] + 1e-3
        result[column][3] = 0.123
        return result

    monkeypatch.setattr(arithmetic, "score_pairs", shifted)
    wrong = [finding for finding in arithmetic.examine() if not finding.right]
    assert len(wrong) == 1
    assert "bundled trajectories" in wrong[0].name
    assert column in wrong[0].found


def test_report_says_the_verdict():
    console = Console(record=True, width=120, file=io.StringIO())
    assert not doctor.report([arithmetic.Finding("a check", "7", False)], {"python": "3"}, console)
    text = console.export_text()
    assert "WRONG" in text
    assert doctor.report([arithmetic.Finding("a check", "7", True)], doctor.machine(), console)


def run(monkeypatch, *overrides):
    """The command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["doctor", *overrides])
    try:
        doctor.main()
    except SystemExit as stop:
        return stop.code
    finally:
        GlobalHydra.instance().clear()
    return 0


def test_exit_codes_of_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, f"output_dir={tmp_path / 'd'}") == 0
    assert "right numbers" in capsys.readouterr().out
    content = json.loads((tmp_path / "d" / "doctor.json").read_text())
    assert content["right"] is True
    assert {"numpy", "cores", "memory", "free disk"} <= content["machine"].keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]  # nothing else is left behind
    right = np.linalg.pinv
    monkeypatch.setattr(np.linalg, "pinv", lambda matrix: 30.0 * right(matrix))
    assert run(monkeypatch) == doctor.EXIT_WRONG_NUMBERS == 3
    assert "WRONG" in capsys.readouterr().out
