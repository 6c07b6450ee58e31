"""What of a scene does not depend on the prediction, computed once when the cache is built.

PDM-Closed enters a score only through its raw progress and its multiplicative product, the human only through the
sub-scores in which he gets 0. Stored in the record, they make scoring a prediction cost the prediction alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from navsim_ext.metric_cache.polygon_table import PolygonTable
from navsim_ext.metric_cache.schema import SceneMetricCache
from navsim_ext.pdm.columns import V2_HC, V2_NC
from navsim_ext.pdm.references import references_from_predictions, references_from_trajectory
from navsim_ext.pdm.resident import prepare
from navsim_ext.pdm.scorer import score_proposals
from navsim_ext.pdm.simulator import simulate


def complete(scene: SceneMetricCache, table: PolygonTable) -> SceneMetricCache:
    """The record with ``pdm_progress``, ``pdm_multiplier`` and ``human_sub_scores`` filled in.

    The human is scored alone (no past: history comfort 1; progress relative to himself) on v2's replay. Raises
    UnscorableScene when the scene's map does not allow a score.
    """
    ready = prepare(scene, table)
    progress, multiplier = np.empty(2), np.empty(2)
    for i, version in enumerate(("v1", "v2")):
        references = references_from_trajectory(scene.pdm_closed[i], scene.time_us)
        states = simulate(references[None], scene.ego_state)
        scores = score_proposals(states, ready.surroundings, ready.traffic, version)
        progress[i], multiplier[i] = scores.progress[0], scores.multiplicative[0].prod()
    human = np.full(V2_HC - V2_NC + 1, np.nan)
    if np.isfinite(scene.human_poses).all():
        references = references_from_predictions(scene.human_poses[None], scene.ego_state, scene.time_us)
        states = simulate(references, scene.ego_state)
        scores = score_proposals(states, ready.surroundings, ready.traffic, "v2")
        (nc, dac, tlc, ddc), (ep, ttc, lk, hc) = scores.multiplicative[0], scores.weighted[0]
        human = np.array([nc, dac, ddc, tlc, ep, ttc, lk, hc])
    return dataclasses.replace(scene, pdm_progress=progress, pdm_multiplier=multiplier, human_sub_scores=human)


