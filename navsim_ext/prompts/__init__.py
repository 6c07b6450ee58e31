"""The words of the trajectory task: one template file in, a system and a user message out.

The QA writer, the hidden-state export and the text planner all ask with the same words, so a prompt digest belongs
into the fingerprint of everything that was made with them. Published weights expect their published wording: put
it into a file of the same form and pass its path as ``template``. The name of a file beside this one will do as well:
``trajectory`` (the default) or ``brief``, which leaves the rules to training: a twelfth of the words, for small models.

Form of a template: a line ``[system]``, its text, a line ``[user]``, its text. Placeholders (``string.Template``):
``$images`` (one ``<image>`` per camera view), ``$history``, ``$command`` (all three required) and ``$views``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from string import Template

import numpy as np
from numpy.typing import ArrayLike

from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.files import reading
from navsim_ext.fingerprint import digest_json
from navsim_ext.frames import NUM_HISTORY_POSES
from navsim_ext.prompts.trajectory_text import ParsedTrajectory, format_pose, format_trajectory, parse_trajectory
from navsim_ext.scene import COMMANDS

__all__ = [
    "COMMAND_WORDS",
    "IMAGE_PLACEHOLDER",
    "VIEW_NAMES",
    "ParsedTrajectory",
    "Prompt",
    "PromptTemplate",
    "TemplateError",
    "format_pose",
    "format_trajectory",
    "load_template",
    "parse_trajectory",
    "prompt_digest",
    "trajectory_prompt",
]

DEFAULT_TEMPLATE = "trajectory"
SHIPPED = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.txt"))}
IMAGE_PLACEHOLDER = "<image>"
REQUIRED_FIELDS = ("images", "history", "command")
OPTIONAL_FIELDS = ("views",)
COMMAND_WORDS = {"left": "TURN LEFT", "straight": "GO STRAIGHT", "right": "TURN RIGHT", "unknown": "UNKNOWN"}
VIEW_NAMES = {
    "CAM_F0": "FRONT VIEW",
    "CAM_L0": "FRONT LEFT VIEW",
    "CAM_R0": "FRONT RIGHT VIEW",
    "CAM_L1": "LEFT VIEW",
    "CAM_R1": "RIGHT VIEW",
    "CAM_L2": "BACK LEFT VIEW",
    "CAM_R2": "BACK RIGHT VIEW",
    "CAM_B0": "BACK VIEW",
}


class TemplateError(TriviumError):
    """A prompt template lacks a section or a placeholder, or names one that does not exist."""


@dataclass(frozen=True)
class Prompt:
    """One question to a vision-language model; ``user`` holds one ``<image>`` for each picture, in order."""

    system: str
    user: str


@dataclass(frozen=True)
class PromptTemplate:
    """A parsed template file; ``digest`` (SHA-256 hex) covers its words only, not its path."""

    system: str
    user: str
    path: str

    @property
    def digest(self) -> str:
        return digest_json({"system": self.system, "user": self.user})


@lru_cache(maxsize=16)
def load_template(path: str | Path | None = None) -> PromptTemplate:
    """Reads a template by path or shipped name (default: Trivium's own); raises MissingError or TemplateError."""
    path = DEFAULT_TEMPLATE if path is None else path
    path = SHIPPED.get(str(path), Path(path))
    if not path.is_file():
        raise MissingError(
            f"prompt template {path} does not exist: give {' or '.join(SHIPPED)}, or the path of a text file with "
            "[system] and [user] sections"
        )
    with reading(path, "write it in UTF-8"):
        text = path.read_text(encoding="utf-8")
    sections = re.split(r"^\[(system|user)\][ \t]*$", text, flags=re.MULTILINE)
    names, texts = sections[1::2], [text.strip("\n") for text in sections[2::2]]
    if names != ["system", "user"] or sections[0].strip():
        raise TemplateError(f"{path} has sections {names}; it must consist of one [system] and one [user], in order")
    found = set()
    for text in texts:
        template = Template(text)
        if not template.is_valid():
            raise TemplateError(f"{path} holds a stray $: write $$ for a dollar sign")
        found |= set(template.get_identifiers())
    missing, unknown = set(REQUIRED_FIELDS) - found, found - set(REQUIRED_FIELDS) - set(OPTIONAL_FIELDS)
    if missing or unknown:
        raise TemplateError(
            f"{path}: placeholders missing: {sorted(missing)}, unknown: {sorted(unknown)}; required are "
            f"{list(REQUIRED_FIELDS)}, allowed besides {list(OPTIONAL_FIELDS)}"
        )
    return PromptTemplate(*texts, path=str(path))


def trajectory_prompt(
    history: ArrayLike,
    command: str | int,
    cameras: Sequence[str] = ("CAM_F0",),
    template: str | Path | None = None,
) -> Prompt:
    """The request for the next 4 s.

    Args:
        history: [4,3] poses (x, y [m], heading [rad]) at -1.5, -1.0, -0.5, 0 s in the ego frame of now, oldest first.
        command: a name of ``navsim_ext.scene.COMMANDS`` or its index in the driving-command one-hot.
        cameras: views in the order of the pictures, names of ``navsim_ext.scene.CAMERAS``.
        template: path of a template file or name of a shipped one; None is ``trajectory``.

    Raises DataError for a wrong history shape, a pose that is not finite, an unknown command or camera.
    """
    history = np.asarray(history, dtype=np.float64)
    if history.shape != (NUM_HISTORY_POSES, 3):
        raise DataError(f"history has shape {history.shape}, ({NUM_HISTORY_POSES}, 3) was expected")
    indices = range(len(COMMANDS))
    name = command if isinstance(command, str) else COMMANDS[command] if command in indices else None
    if name not in COMMAND_WORDS:
        raise DataError(f"driving command {command!r} does not exist; there are {COMMANDS}")
    unknown = [camera for camera in cameras if camera not in VIEW_NAMES]
    if unknown or not cameras:
        raise DataError(f"camera views {list(cameras)}: {unknown or 'none given'}; there are {list(VIEW_NAMES)}")
    if len(cameras) == 1:
        images = IMAGE_PLACEHOLDER
    else:
        images = "\n".join(f"{VIEW_NAMES[camera]}: {IMAGE_PLACEHOLDER}" for camera in cameras)
    steps = range(NUM_HISTORY_POSES - 1, -1, -1)
    words = {
        "images": images,
        "views": ", ".join(VIEW_NAMES[camera].lower() for camera in cameras),
        "history": ", ".join(f"t-{step}: {format_pose(pose)}" for step, pose in zip(steps, history, strict=True)),
        "command": COMMAND_WORDS[name],
    }
    chosen = load_template(template)
    return Prompt(Template(chosen.system).substitute(words), Template(chosen.user).substitute(words))


def prompt_digest(template: str | Path | None = None, cameras: Sequence[str] = ("CAM_F0",)) -> str:
    """SHA-256 hex of the wording and the views: the field ``prompt`` of a fingerprint."""
    return digest_json({"template": load_template(template).digest, "cameras": list(cameras)})
