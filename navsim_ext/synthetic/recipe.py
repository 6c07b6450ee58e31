"""Which log is what: split, town, situation and random key of every log index, without any state.

Log i of a recipe never depends on how many logs there are, so a larger build extends a smaller one. Splits and
situations are spread by Kronecker sequences (frac(i * irrational)): small sets already have the wanted mix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from navsim_ext.errors import DataError
from navsim_ext.frames import POSE_INTERVAL_S
from navsim_ext.prompts import load_template
from navsim_ext.scene import CAMERAS, MAP_LOCATIONS
from navsim_ext.synthetic.drive import Drive, NoDrive, Run, recorded, run
from navsim_ext.synthetic.log_writer import log_name
from navsim_ext.synthetic.scenarios import SITUATIONS, Plan
from navsim_ext.synthetic.town import make_town, stream

HISTORY_FRAMES, FUTURE_FRAMES = 4, 10
WARM_UP_S = 3.0
PARTS = ("train", "val", "test")
FOLDER_OF_PART = {"train": "trainval", "val": "trainval", "test": "test"}
CAMERA_FRAMES = ("now", "history", "all")


@dataclass(frozen=True)
class Recipe:
    """Everything that the content of a data set follows from."""

    scenes: int
    seed: int
    scenes_per_log: int
    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    camera_frames: str
    jpeg_quality: int
    val_share: float
    test_share: float
    test_location: str
    mix: dict[str, float]
    qa: bool
    template: str | None

    def validate(self) -> Recipe:
        """Returns self; raises DataError naming the option, what it is and what it may be (MissingError: template)."""

        def need(name: str, good: bool, expected: str) -> None:
            if not good:
                raise DataError(f"synthetic world: {name} is {getattr(self, name)!r}; {expected} was expected")

        need("scenes", self.scenes >= 1, "at least 1")
        need("scenes_per_log", 1 <= self.scenes_per_log <= 60, "1 to 60")
        need("cameras", set(self.cameras) <= set(CAMERAS), f"a list of {CAMERAS}")
        need("camera_frames", self.camera_frames in CAMERA_FRAMES, f"one of {CAMERA_FRAMES}")
        need("jpeg_quality", 1 <= self.jpeg_quality <= 100, "1 to 100")
        need("test_location", self.test_location in MAP_LOCATIONS, f"one of {MAP_LOCATIONS}")
        for name in ("val_share", "test_share"):
            need(name, 0.0 <= getattr(self, name) < 1.0, "a share in [0, 1)")
        need("test_share", self.val_share + self.test_share < 1.0, "less than 1 together with val_share")
        known = set(self.mix) <= set(SITUATIONS) and all(weight >= 0.0 for weight in self.mix.values())
        need("mix", known and sum(self.mix.values()) > 0.0, f"weights >= 0, not all 0, of {sorted(SITUATIONS)}")
        need("qa", not self.qa or "CAM_F0" in self.cameras, "false without the camera CAM_F0")
        load_template(self.template)  # now, not when the questions are written after all drives
        return self

    @property
    def logs(self) -> int:
        return -(-self.scenes // self.scenes_per_log)

    def scenes_of(self, index: int) -> int:
        """Windows of a log; the last one may have fewer."""
        return min(self.scenes_per_log, self.scenes - index * self.scenes_per_log)

    def name_of(self, index: int) -> str:
        return log_name(self.seed, index)

    def part_of(self, index: int) -> str:
        """train, val or test."""
        at = _spread(index, 0.6180339887498949, self.seed, "part")
        if at < self.test_share:
            return "test"
        return "val" if at < self.test_share + self.val_share else "train"

    def location_of(self, index: int) -> str:
        """The test town for test logs, one of the others for all else."""
        if self.part_of(index) == "test":
            return self.test_location
        others = [location for location in MAP_LOCATIONS if location != self.test_location]
        return others[int(_spread(index, 0.7548776662466927, self.seed, "location") * len(others))]

    def kinds_of(self, index: int) -> list[str]:
        """The situation of a log, followed by those tried should its town not offer it."""
        names = [name for name, weight in self.mix.items() if weight > 0.0]
        shares = np.cumsum([self.mix[name] for name in names]) / sum(self.mix.values())
        first = int(np.searchsorted(shares, _spread(index, 0.4142135623730951, self.seed, "kind"), side="right"))
        first = min(first, len(names) - 1)
        return names[first:] + names[:first]

    def frames_with_pictures(self, windows: int) -> range:
        """Frames of a log with ``windows`` windows that get pictures."""
        first = HISTORY_FRAMES - 1
        if self.camera_frames == "now":
            return range(first, first + windows)
        if self.camera_frames == "history":
            return range(first + windows)
        return range(HISTORY_FRAMES + FUTURE_FRAMES + windows - 1)

    def drive(self, index: int) -> Drive:
        """Log ``index`` at 2 Hz; raises as :meth:`run`."""
        return recorded(self.run(index))

    def run(self, index: int) -> Run:
        """Simulates log ``index``; raises NoDrive when its town offers none of the situations of the mix."""
        windows = self.scenes_of(index)
        frames = HISTORY_FRAMES + FUTURE_FRAMES + windows - 1
        focus_s = WARM_UP_S + POSE_INTERVAL_S * (HISTORY_FRAMES - 1 + 0.5 * (windows - 1))
        town = make_town(self.location_of(index), self.seed)
        problems = []
        for kind in self.kinds_of(index):
            plan = Plan(town, kind, WARM_UP_S, POSE_INTERVAL_S * (frames - 1), focus_s)
            try:
                return run(plan, self.seed, index, kind)
            except NoDrive as problem:
                problems.append(str(problem))
        raise NoDrive("; ".join(problems))


def _spread(index: int, step: float, *key: int | str) -> float:
    """frac(u + index * step) with a random u of the key: evenly spread over [0, 1) for any stretch of indices."""
    return float((stream("spread", *key).random() + index * step) % 1.0)
