"""Reading trajectories out of words: every listed form, named repairs, and no plan where there is none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_ext.prompts import format_trajectory
from navsim_ext.prompts.trajectory_text import continue_motion, parse_trajectory

POSES = np.array([[1.5 * k, 0.05 * k * k, 0.03 * k] for k in range(1, 9)]).round(2)
PLAIN = format_trajectory(POSES)
INNER = PLAIN.removeprefix("[PT, ").removesuffix("]")
FLAT = INNER.replace("(", "").replace(")", "")


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        f"Here is the plan:\n**{PLAIN}**\nDrive safely for 4 seconds.",
        f"```json\n{PLAIN}\n```",
        f"PT = [{INNER}]",
        f"PT: {INNER}",
        f"pt={INNER}",
        f"[PT], {INNER}",
        f"[PT, {INNER}",
        f"PT, {INNER.replace('(', '[').replace(')', ']')}]",
        PLAIN.replace("+", ""),
        PLAIN.replace("+", "+ "),
        PLAIN.replace(", (", ",\n ("),
        PLAIN.replace(",", "，").replace("(", "（").replace(")", "）"),
        f"The last pose was t-0: (+0.00, +0.00, +0.00), t-1: (-1.0, 0.0, 0.0).\n{PLAIN}",
        PLAIN.replace(", +", " m, +").replace(")", " rad)"),
    ],
)
def test_complete_answers_in_any_dress_need_no_repair(text):
    parsed = parse_trajectory(text)
    assert parsed.valid, parsed.reason
    np.testing.assert_allclose(parsed.poses, POSES)
    assert parsed.repairs == ()


def test_signs():
    text = "[PT, " + ", ".join(["(1.0, +-0.5, −0.25)"] * 8) + "]"
    np.testing.assert_allclose(parse_trajectory(text).poses, [[1.0, -0.5, -0.25]] * 8)
    assert not parse_trajectory(text.replace("+-", "--")).valid


@pytest.mark.parametrize(
    ("text", "rule"),
    [(f"PT = [{FLAT}]", "no_brackets"), (INNER, "no_mark"), (PLAIN[:-1] + ", (+99.00, +9.00, +0.00)]", "surplus")],
)
def test_repairs_are_named(text, rule):
    parsed = parse_trajectory(text)
    np.testing.assert_allclose(parsed.poses, POSES)
    assert parsed.repairs == (rule,)


@pytest.mark.parametrize("kept", [4, 5, 6, 7])
def test_a_broken_off_list_goes_on_with_its_last_motion(kept):
    cut = PLAIN.split(", (")[: kept + 1]
    parsed = parse_trajectory(", (".join(cut) + ", (+9.0")
    assert parsed.repairs == ("truncated",)
    np.testing.assert_allclose(parsed.poses[:kept], POSES[:kept])
    np.testing.assert_allclose(parsed.poses, continue_motion(POSES[:kept], 8))


def test_continuing_a_circle_stays_on_it():
    angle = 0.1 * np.arange(1, 9)
    circle = np.stack([10 * np.sin(angle), 10 * (1 - np.cos(angle)), angle], axis=1)
    np.testing.assert_allclose(continue_motion(circle[:4], 8), circle, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("```\n```", "empty"),
        ("I would slow down and stop at the light.", "no points"),
        ("[PT, (+1.00, +0.00, +0.00), (+2.00, +0.00, +0.00), (+3.00, +0.00, +0.00)]", "3 points"),
        ("[PT, (+1.00, +0.00), (+2.00, +0.00), (+3.00, +0.00), (+4.00, +0.00)]", "no points"),
        ("(+1.00, +0.00, +0.00), (+2.00, +0.00, +0.00)", "no PT mark and 2 points"),
        ("[PT, " + ", ".join(["(900.0, 0.0, 0.0)"] * 8) + "]", "farther"),
        ("The 4 lanes at 13.5 m/s and 2 cars", "no points"),
        ("[PT, " + "+0.0.0, +0.0, +0.00.0, " * 20 + "]", "no points"),  # digits, but no numbers
        ("[PT, " + "+1.0, +0.0, +0.0, " * 8 + "+0.0.0]", "no points"),
        (PLAIN.replace("+4.50", "+4.5.0"), "no points"),  # one point that cannot be read: no seven others instead
        (PLAIN.replace("(+4.50,", "("), "no points"),
    ],
)
def test_what_is_no_plan_is_invalid_with_its_reason(text, reason):
    parsed = parse_trajectory(text)
    assert parsed.poses is None
    assert reason in parsed.reason
    assert parsed.repairs == ()


@settings(max_examples=200, deadline=None)
@given(poses=st.lists(st.tuples(st.floats(-50, 90), st.floats(-30, 30), st.floats(-3, 3)), min_size=8, max_size=8))
def test_format_and_parse_round_trip(poses):
    parsed = parse_trajectory(format_trajectory(poses))
    np.testing.assert_allclose(parsed.poses, np.round(poses, 2), atol=1e-9)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="PT[](){},;+-.0123456789eab \n*`", max_size=120))
def test_no_text_breaks_the_parser(text):
    parsed = parse_trajectory(text)
    assert parsed.valid == (parsed.poses is not None)
    if parsed.valid:
        assert parsed.poses.shape == (8, 3)
        assert np.isfinite(parsed.poses).all()
    else:
        assert parsed.reason
