"""Poses to words and words back to poses: the answer to a trajectory prompt, written and read.

Reading is tolerant but never inventive.

What is understood: ``[PT, (+1.00, -0.10, +0.02), ...]`` with or without bold marks, code fences, brackets, ``PT =`` or
``PT:``, square or curly brackets around points, units behind numbers, typographic signs, ``+-0.10``. Rules that
change the answer are named in ``repairs``:

    surplus        more than 8 points behind the mark: the first 8 count
    truncated      4 to 7 points, the list broken off: the last motion (in SE(2), from the last two points) goes on
    no_mark        no ``PT`` anywhere, but exactly 8 points: they count
    no_brackets    numbers without brackets around the points: taken three by three

Anything else is invalid, with its reason. There is no default trajectory: words that say nothing are not a plan.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from navsim_ext.errors import DataError
from navsim_ext.frames import NUM_FUTURE_POSES, to_global, to_local, wrap_angle

MIN_POINTS = 4  # 2 s: half of the plan must be the model's own
MAX_DISTANCE_M = 200.0  # 4 s at 50 m/s

_NUMBER = r"[+-]{0,2}(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_UNIT = r"\s*(?:meters|metres|rad(?:ians)?|m)?"
_POINT = re.compile(rf"[(\[{{]\s*({_NUMBER}){_UNIT}\s*[,;]\s*({_NUMBER}){_UNIT}\s*[,;]\s*({_NUMBER}){_UNIT}\s*[)\]}}]")
_GROUP = re.compile(r"[(\[{][^()\[\]{}]*\d[^()\[\]{}]*[,;][^()\[\]{}]*[)\]}]")  # what looks like a point
_END = r"(?:[\s,;\])}]+|\.(?=\s|$)|$)"  # of a number without brackets; "0.0.0" is none
_MARK = re.compile(r"\bpt\b\s*[\]\"']?\s*[,=:]?", re.IGNORECASE)
_SIGNS = str.maketrans({"−": "-", "–": "-", "—": "-", "＋": "+", "（": "(", "）": ")", "，": ",", "【": "[", "】": "]"})


def format_pose(pose: ArrayLike) -> str:
    """``(+x.xx, +y.yy, +h.hh)`` of a pose [3]; raises DataError when it is not finite.

    Rounded to two decimals before formatting, so that -0.001 reads +0.00.
    """
    pose = np.asarray(pose, dtype=np.float64)
    if pose.shape != (3,) or not np.isfinite(pose).all():
        raise DataError(f"a pose must be 3 finite numbers (x, y, heading), not {pose.tolist()}")
    return "(" + ", ".join(f"{value + 0.0:+.2f}" for value in np.round(pose, 2)) + ")"


def format_trajectory(poses: ArrayLike) -> str:
    """``[PT, (+x.xx, +y.yy, +h.hh), ...]`` of poses [N,3] (metres, radians): the answer to a trajectory prompt."""
    poses = np.asarray(poses, dtype=np.float64)
    if poses.ndim != 2 or poses.shape[1] != 3:
        raise DataError(f"a trajectory has shape [N, 3], not {poses.shape}")
    return "[PT, " + ", ".join(format_pose(pose) for pose in poses) + "]"


@dataclass(frozen=True)
class ParsedTrajectory:
    """``poses`` [8,3] (metres, radians), or None with the ``reason``; ``repairs`` are the rules that were needed."""

    poses: NDArray[np.float64] | None
    reason: str = ""
    repairs: tuple[str, ...] = field(default=())

    @property
    def valid(self) -> bool:
        return self.poses is not None


def parse_trajectory(text: str, count: int = NUM_FUTURE_POSES) -> ParsedTrajectory:
    """The plan that ``text`` states; see the rules in the header."""
    text = re.sub(r"```\w*|[*`_]", " ", text.translate(_SIGNS))
    text = re.sub(r"([+-])\s+(?=[\d.])", r"\1", text)  # "- 0.10"
    if not text.strip():
        return ParsedTrajectory(None, "empty answer")
    repairs: list[str] = []
    marks = list(_MARK.finditer(text))
    if marks:
        points = max((_points(text[mark.end() :], repairs) for mark in reversed(marks)), key=_usable)
    else:
        repairs.append("no_mark")
        points = _points(text, repairs)
        if len(points) not in (0, count):
            return ParsedTrajectory(None, f"no PT mark and {len(points)} points instead of {count}")
    if len(points) == 0:
        return ParsedTrajectory(None, "no points")
    poses = np.asarray(points, dtype=np.float64)
    if not np.isfinite(poses).all() or np.abs(poses[:, :2]).max() > MAX_DISTANCE_M:
        return ParsedTrajectory(None, f"a point is farther than {MAX_DISTANCE_M:.0f} m")
    if len(poses) > count:
        repairs.append("surplus")
        poses = poses[:count]
    elif len(poses) < count:
        if len(poses) < MIN_POINTS:
            return ParsedTrajectory(None, f"{len(poses)} points, at least {MIN_POINTS} are needed")
        repairs.append("truncated")
        poses = continue_motion(poses, count)
    poses[:, 2] = wrap_angle(poses[:, 2])
    used = tuple(rule for rule in ("no_mark", "no_brackets", "surplus", "truncated") if rule in repairs)
    return ParsedTrajectory(poses, "", used)


def continue_motion(poses: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Extends [n,3] to [count,3] by the last step: p_k+1 = p_k + (p_k - p_k-1), differences in SE(2)."""
    extended = list(poses)
    step = to_local(extended[-1], extended[-2])
    while len(extended) < count:
        extended.append(to_global(step, extended[-1]))
    return np.stack(extended)


def _points(text: str, repairs: list[str]) -> list[tuple[float, float, float]]:
    found = list(_POINT.finditer(text))
    if found:
        gaps = (text[one.end() : next_one.start()] for one, next_one in pairwise(found))
        if any(_GROUP.search(gap) for gap in gaps):  # a point amid the list that cannot be read: which is which?
            return []
        return [tuple(map(_number, match.groups())) for match in found]
    # Numbers without brackets; a group of two (x, y) or a text with other numbers in it is not guessed at.
    if re.search(rf"[(\[{{]\s*{_NUMBER}{_UNIT}\s*,\s*{_NUMBER}{_UNIT}\s*[)\]}}]", text, re.IGNORECASE):
        return []
    plain = re.match(rf"[\s,;\[({{]*((?:{_NUMBER}{_UNIT}{_END})+)", text, re.IGNORECASE)
    if plain is None or re.match(r"[+\-.\d]", text[plain.end() :]):
        return []
    numbers = [_number(value) for value in re.findall(_NUMBER, plain.group(1), re.IGNORECASE)]
    if len(numbers) < 3:
        return []
    repairs.append("no_brackets")
    return [tuple(numbers[start : start + 3]) for start in range(0, len(numbers) // 3 * 3, 3)]


def _number(text: str) -> float:
    """A number whose last sign counts: ``+-0.10`` is -0.10; ``--0.10`` is nonsense and becomes NaN."""
    signs = re.match(r"[+-]*", text).group()
    return float("nan") if signs == "--" else float(signs[-1:] + text[len(signs) :])


def _usable(points: list) -> int:
    return min(len(points), NUM_FUTURE_POSES)
