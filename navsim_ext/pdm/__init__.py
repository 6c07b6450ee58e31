"""NAVSIM's PDM score (of its Predictive Driver Model), exact and compiled: simulator, both scorers, PDM-Closed.

from navsim_ext.pdm import RewardWeights, score
result = score(tokens, trajectories, MetricCache(folder), reward=RewardWeights())   # result.pdms_v1, result.reward
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from navsim_ext.exports import exported

if TYPE_CHECKING:
    from navsim_ext.pdm.result import PdmResult
    from navsim_ext.pdm.reward import RewardWeights
    from navsim_ext.pdm.scores import TrajectoryShapeError, score, score_pairs
    from navsim_ext.pdm.version import scorer_fingerprint

__all__ = ["PdmResult", "RewardWeights", "TrajectoryShapeError", "score", "score_pairs", "scorer_fingerprint"]

# who only reads records or versions needs no compiler
__getattr__ = exported(
    __name__,
    {
        "PdmResult": "result",
        "RewardWeights": "reward",
        "TrajectoryShapeError": "scores",
        "score": "scores",
        "score_pairs": "scores",
        "scorer_fingerprint": "version",
    },
)
