"""Motion vocabularies that others have published, for those who hold the files: SMART's and CAT-K's.

Both are pickles of a dictionary with an entry ``token_all`` of {``veh``, ``ped``, ``cyc``: [V, 6, 4, 2]}: the corners
(front left, front right, rear right, rear left; m) of a box of the class at the poses 0, 0.1, ..., 0.5 s, in the frame
of the first. SMART's file has ``token`` (the last boxes) and ``traj`` (poses [V, 6, 3]) beside it. They were made from
the Waymo Open Motion Dataset and stay under its terms: a vocabulary built from them is not to be passed on.

Read by the restricted unpickler: a file that names anything but numpy arrays and plain containers is refused. A file
that holds torch tensors must be saved again with numpy arrays. Written from a description of the files (SMART, arXiv
2405.15677; CAT-K, arXiv 2412.05334); neither was at hand, so only the format as described is tested. Their weights
cannot be compared: networks of this suite read motions as numbers and have no table of token embeddings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from navsim_ext.closed_loop.kinematics import TOKEN_STEPS, relative
from navsim_ext.errors import DataError
from navsim_ext.pickles import load
from sim_agents.vocabulary.motion import CLASS_NAMES, MATCHING_BOX_M

CLASS_KEYS = ("veh", "ped", "cyc")
BOX_TOLERANCE_M = 0.02
"""How far the sides of a published box may be from the class's: another box means another format."""


def published_tokens(path: str | os.PathLike[str]) -> dict[str, NDArray[np.float32]]:
    """{class name: tokens [V, J, 3]} of a file. Raises MissingError, RefusedObject and DamagedPickle as the unpickler
    does, DataError for content that is not the format."""
    content = load(path)
    boxes = content.get("token_all") if isinstance(content, Mapping) else None
    if not isinstance(boxes, Mapping) or not set(CLASS_KEYS) <= set(boxes):
        raise DataError(f"{path}: a dictionary with token_all of {', '.join(CLASS_KEYS)} was expected")
    return {
        name: _tokens(boxes[key], side, f"{path}, token_all, {key}")
        for name, key, side in zip(CLASS_NAMES, CLASS_KEYS, MATCHING_BOX_M, strict=True)
    }


def _tokens(boxes: object, side: tuple[float, float], where: str) -> NDArray[np.float32]:
    if not isinstance(boxes, np.ndarray) or boxes.dtype.kind not in "fiu":
        raise DataError(f"{where} is no array of numbers but {type(boxes).__name__}: save it again with numpy arrays")
    if boxes.ndim != 4 or boxes.shape[1:] != (TOKEN_STEPS + 1, 4, 2) or len(boxes) == 0:
        raise DataError(f"{where} has the shape {boxes.shape}; [V, {TOKEN_STEPS + 1}, 4, 2] was expected")
    corners = boxes.astype(np.float64)
    if not np.isfinite(corners).all():
        token = int(np.argwhere(~np.isfinite(corners))[0][0])
        raise DataError(f"{where} has a number that is not finite in token {token}")
    front, rear = corners[:, :, :2].mean(axis=2), corners[:, :, 2:].mean(axis=2)
    length = np.linalg.norm(corners[:, :, 0] - corners[:, :, 3], axis=-1)
    width = np.linalg.norm(corners[:, :, 0] - corners[:, :, 1], axis=-1)
    for found, wanted, what in ((length, side[0], "length"), (width, side[1], "width")):
        if np.abs(found - wanted).max() > BOX_TOLERANCE_M:
            told = f"{found.min():.2f} to {found.max():.2f} m"
            raise DataError(f"{where}: boxes have a {what} of {told}; {wanted} m was expected")
    along = front - rear
    poses = np.concatenate([corners.mean(axis=2), np.arctan2(along[..., 1], along[..., 0])[..., None]], axis=-1)
    poses = torch.from_numpy(poses.astype(np.float32))
    return relative(poses[:, 0], poses[:, 1:]).numpy()
