"""Trajectory prompt: wording comes from one file, placeholders are checked, numbers have sign and two decimals."""

import numpy as np
import pytest

from navsim_ext.errors import DataError, MissingError
from navsim_ext.prompts import (
    TemplateError,
    format_trajectory,
    load_template,
    prompt_digest,
    trajectory_prompt,
)

HISTORY = np.array([[-6.004, 0.126, -0.004], [-4.0, 0.05, 0.02], [-2.0, 0.01, 0.01], [0.0, 0.0, 0.0]])


def test_prompt_states_history_command_and_one_image_per_view():
    prompt = trajectory_prompt(HISTORY, "left", cameras=("CAM_F0", "CAM_L0", "CAM_R0"))
    assert "t-3: (-6.00, +0.13, +0.00), t-2: (-4.00, +0.05, +0.02)" in prompt.user
    assert "[TURN LEFT]" in prompt.user
    assert prompt.user.count("<image>") == 3
    assert prompt.user.startswith("FRONT VIEW: <image>\nFRONT LEFT VIEW: <image>\n")
    assert "(5 * TTC + 5 * EP + 2 * C + 0 * DDC) / 12" in prompt.system
    assert trajectory_prompt(HISTORY, 0).user == trajectory_prompt(HISTORY, np.int64(0)).user
    assert "[UNKNOWN]" in trajectory_prompt(HISTORY, 3).user


def test_constant_text_is_the_system_message():
    first, second = trajectory_prompt(HISTORY, 0), trajectory_prompt(HISTORY * 2, "right")
    assert first.system == second.system
    assert first.user != second.user


def test_format_trajectory_has_sign_two_decimals_and_no_negative_zero():
    assert format_trajectory([[1.005, -0.001, 0.0], [12.346, -2.5, 0.1]]) == (
        "[PT, (+1.00, +0.00, +0.00), (+12.35, -2.50, +0.10)]"
    )
    with pytest.raises(DataError, match="finite"):
        format_trajectory([[1.0, float("nan"), 0.0]])
    with pytest.raises(DataError, match=r"\[N, 3\]"):
        format_trajectory([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("history", "command", "cameras", "message"),
    [
        (HISTORY[:3], "left", ("CAM_F0",), r"\(3, 3\)"),
        (HISTORY, "u-turn", ("CAM_F0",), "u-turn"),
        (HISTORY, 4, ("CAM_F0",), "4"),
        (HISTORY, "left", ("CAM_X",), "CAM_X"),
        (HISTORY, "left", (), "none given"),
    ],
)
def test_bad_questions_are_named(history, command, cameras, message):
    with pytest.raises(DataError, match=message):
        trajectory_prompt(history, command, cameras)


def test_users_template_replaces_the_wording_and_changes_the_digest(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("[system]\nDrive for $$5.\n[user]\n$images\n$command: $history\n")
    prompt = trajectory_prompt(HISTORY, "straight", template=path)
    assert prompt.system == "Drive for $5."
    assert prompt.user.startswith("<image>\nGO STRAIGHT: t-3: (-6.00")
    assert prompt_digest(path) != prompt_digest()
    assert prompt_digest(cameras=("CAM_F0", "CAM_B0")) != prompt_digest()
    same = tmp_path / "copy.txt"
    same.write_text(path.read_text())
    assert load_template(same).digest == load_template(path).digest


def test_the_brief_wording_is_shipped_by_name():
    brief, whole = (trajectory_prompt(HISTORY, "left", template=name) for name in ("brief", "trajectory"))
    assert whole == trajectory_prompt(HISTORY, "left")
    for prompt in (brief, whole):
        assert prompt.user.count("<image>") == 1
        assert "TURN LEFT" in prompt.user
        assert "t-0: (+0.00, +0.00, +0.00)" in prompt.user
    assert 5 * len(brief.system + brief.user) < len(whole.system + whole.user)
    assert prompt_digest("brief") != prompt_digest() == prompt_digest("trajectory")
    with pytest.raises(MissingError, match="brief or trajectory"):
        load_template("brif")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[system]\nx\n[user]\n$images $command\n", "history"),
        ("[system]\nx\n[user]\n$images $command $history $weather\n", "weather"),
        ("[user]\n$images $command $history\n", "sections"),
        ("[system]\nx\n[user]\n$images $command $history costs 5$\n", "stray"),
    ],
)
def test_broken_templates_are_named(tmp_path, text, message):
    path = tmp_path / "broken.txt"
    path.write_text(text)
    with pytest.raises(TemplateError, match=message):
        trajectory_prompt(HISTORY, "left", template=path)
