"""From boxes at 10 Hz back to sightings at 2 Hz, such that the replay of the sightings is the boxes again.

Legend: v1 has 51 steps (0 ... 5 s), v2 41; frame k stands at step 5k; K = 11 frames.
NAVSIM's caches do not say in which frames a track was seen, only where it stands at each step. Several sets of
sightings may give the same boxes; any of them serves, as every score is computed from the boxes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from navsim_ext.devkit.cache_content import CacheContent
from navsim_ext.pdm.record import NUM_FRAMES, NUM_FRAMES_V2

STEPS_PER_FRAME = 5
NEAR = 1e-7  # m and rad: what reading a box back from its polygon may cost


def sightings(v1: NDArray[np.float64] | None, v2: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """[K,3] sightings of one track from its poses in v1 [51,3] and v2 [41,3], NaN where absent; None: no such cache.

    - Seen once within a version's horizon, a track stands unmoved at every step of that version.
    - Otherwise it is present from its first to its last sighting; gaps were bridged linearly, so that a sighting on the
      bridge changes nothing.
    - With one cache alone, the poses at the frames that it sees serve: a track that stands counts as seen in all.
    """
    found = np.full((NUM_FRAMES, 3), np.nan)
    if v1 is None or v2 is None:
        poses = (v2 if v1 is None else v1).copy()
        if _stands(poses, NEAR):
            poses[:] = poses[0]
        at_frames = poses[::STEPS_PER_FRAME]
        found[: len(at_frames)] = at_frames
        return found
    v1 = v1.copy()
    exact = np.isfinite(v1[: len(v2), 0]) & np.isfinite(v2[:, 0]) & (np.abs(v1[: len(v2)] - v2).max(axis=1) < NEAR)
    v1[: len(v2)][exact] = v2[exact]  # v2's cache has them unrounded
    if _stands(v1, NEAR):
        v1[:] = v1[0]
    present_v1, present_v2 = np.isfinite(v1[:, 0]), np.isfinite(v2[:, 0])
    at_frames = v1[::STEPS_PER_FRAME]
    if not present_v2.any():  # only in the frames after 4 s
        if _stands(v1):
            found[NUM_FRAMES_V2] = v1[0]
        else:
            found[NUM_FRAMES_V2:] = at_frames[NUM_FRAMES_V2:]
        return found
    first = int(np.flatnonzero(present_v1)[0]) // STEPS_PER_FRAME
    if _stands(v2) and not exact.all():  # seen once within 4 s, then again later
        found[first] = v2[0]
    else:
        last = int(np.flatnonzero(present_v2)[-1]) // STEPS_PER_FRAME
        found[first : last + 1] = at_frames[first : last + 1]
    found[NUM_FRAMES_V2:] = at_frames[NUM_FRAMES_V2:]
    return found


def _stands(poses: NDArray[np.float64], tolerance: float = 0.0) -> bool:
    """Present at every step, always at the same place."""
    return bool(np.isfinite(poses).all() and (np.abs(poses - poses[0]) <= tolerance).all())


def joint_tracks(v1: CacheContent | None, v2: CacheContent | None) -> tuple[list[str], NDArray[np.float64]]:
    """(tokens in list order, poses [n,K,3]) of the tracks of one or both caches; v1 knows all of v2's."""
    known = v2 if v1 is None else v1
    order = np.argsort(known.track_types, kind="stable")
    tokens = [known.track_tokens[row] for row in order]
    poses = [sightings(_poses(v1, token), _poses(v2, token)) for token in tokens]
    return tokens, np.array(poses).reshape(-1, NUM_FRAMES, 3)


def _poses(content: CacheContent | None, token: str) -> NDArray[np.float64] | None:
    """[T,3] of a track in a cache, NaN where absent; None without that cache."""
    if content is None:
        return None
    if token not in content.track_tokens:
        return np.full((content.track_poses.shape[0], 3), np.nan)
    return content.track_poses[:, content.track_tokens.index(token)]
