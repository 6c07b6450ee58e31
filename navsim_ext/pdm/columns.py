"""The columns of a PDM result, and the arithmetic from sub-scores to scores.

Legend: m is the product of the multiplicative sub-scores; p = raw progress * m [m]; the reference is PDM-Closed.
Sources: NAVSIM 1.1 ``_aggregate_scores``; NAVSIM 2.2 ``_aggregate_pdm_scores``, ``compute_final_scores`` and
``human_penalty_filter``.

    v1  PDMS  = m (5 EP + 5 TTC + 2 C + 0 DDC) / 12,  m = NC DAC
        EP    = p / max(p, p_ref) if that maximum exceeds 5 m, else 1 (0 where m = 0)
    v2  EPDMS = m (5 EP + 5 TTC + 2 LK + 2 HC + 2 EC) / 16,  m = NC DAC DDC TLC; without a predecessor EC and its weight
                fall out (/ 14)
        EP    = clip(raw / max(p, p_ref), 0, 1) if that maximum exceeds 5 m, else 1

NAVSIM takes the maximum over whatever is in its batch; here, as when it scores a prediction, it runs over the
prediction and PDM-Closed alone. Human filter: each sub-score in which the human gets exactly 0 becomes 1 (EC is not
filtered).
"""

from __future__ import annotations

import numpy as np

from navsim_ext.pdm.compiled import kernel

COLUMNS = (
    "v1_nc", "v1_dac", "v1_ttc", "v1_ep", "v1_comfort", "v1_ddc", "pdms_v1",
    "v2_nc", "v2_dac", "v2_ddc", "v2_tlc", "v2_ep", "v2_ttc", "v2_lk", "v2_hc", "v2_ec",
    "epdms_v2_nofilter", "epdms_v2", "reward", "progress_m", "v1_collision_s", "v1_ttc_s", "v2_collision_s", "v2_ttc_s",
)  # fmt: skip
(
    V1_NC, V1_DAC, V1_TTC, V1_EP, V1_COMFORT, V1_DDC, PDMS_V1,
    V2_NC, V2_DAC, V2_DDC, V2_TLC, V2_EP, V2_TTC, V2_LK, V2_HC, V2_EC, EPDMS_NOFILTER, EPDMS,
    REWARD, PROGRESS, V1_COLLISION_S, V1_TTC_S, V2_COLLISION_S, V2_TTC_S,
) = range(24)  # fmt: skip
NUM_COLUMNS = len(COLUMNS)
WITHOUT_COMFORT = {  # EPDMS of single scenes, without two-frame extended comfort: another quantity, other names
    "epdms_v2": "epdms_v2_no_ec",
    "epdms_v2_nofilter": "epdms_v2_no_ec_nofilter",
}
COLUMNS_ALONE = tuple(WITHOUT_COMFORT.get(name, name) for name in COLUMNS)  # of scenes scored one by one
SCORE_COLUMNS = COLUMNS[: EPDMS + 1]  # those of a score file
HUMAN_COLUMNS = ("nc", "dac", "ddc", "tlc", "ep", "ttc", "lk", "hc")  # v2_nc ... v2_hc, in this order

PROGRESS_THRESHOLD = 5.0  # m


@kernel
def finish_v1(row, reference_progress: float, reference_multiplier: float) -> None:
    """Fills EP and PDMS of a row whose v1 sub-scores and raw progress are there."""
    m = row[V1_NC] * row[V1_DAC]
    p = row[PROGRESS] * m
    most = max(p, reference_progress * reference_multiplier)
    if most > PROGRESS_THRESHOLD:
        row[V1_EP] = p / most
    else:
        row[V1_EP] = 0.0 if m == 0.0 else 1.0
    row[PDMS_V1] = m * ((row[V1_EP] * 5.0 + row[V1_TTC] * 5.0 + row[V1_COMFORT] * 2.0) / 12.0)


@kernel
def finish_v2(row, reference_progress: float, reference_multiplier: float, human) -> None:
    """Fills EP and both EPDMS of a row whose v2 sub-scores, raw progress and EC (NaN: no predecessor) are there."""
    m = row[V2_NC] * row[V2_DAC] * row[V2_DDC] * row[V2_TLC]
    most = max(row[PROGRESS] * m, reference_progress * reference_multiplier)
    row[V2_EP] = min(max(row[PROGRESS] / most, 0.0), 1.0) if most > PROGRESS_THRESHOLD else 1.0
    finish_epdms(row, human)


@kernel
def finish_epdms(row, human) -> None:
    """Fills both EPDMS of a row whose v2 sub-scores are all there (EC NaN: no predecessor).

    ``human`` [8]: the human's own sub-scores; NaN when the human's future is unknown, and EPDMS with it.
    """
    filtered = row[V2_NC : V2_HC + 1].copy()
    row[EPDMS_NOFILTER] = _epdms(filtered, row[V2_EC])
    for i in range(len(filtered)):
        if human[i] == 0.0:
            filtered[i] = 1.0
    row[EPDMS] = np.nan if np.isnan(human[0]) else _epdms(filtered, row[V2_EC])


@kernel
def _epdms(x, extended_comfort: float) -> float:
    """x = nc, dac, ddc, tlc, ep, ttc, lk, hc."""
    m = x[0] * x[1] * x[2] * x[3]
    total, weight = 5.0 * x[4] + 5.0 * x[5] + 2.0 * x[6] + 2.0 * x[7], 14.0
    if not np.isnan(extended_comfort):
        total += 2.0 * extended_comfort
        weight += 2.0
    return m * (total / weight)


@kernel
def finish_reward(row, weights) -> None:
    """Fills the reward; ``weights`` [6] as of RewardWeights.as_array, version 0: none."""
    if weights[0] == 1.0:
        m = row[V1_NC] * row[V1_DAC]
        total = weights[1] * row[V1_EP] + weights[2] * row[V1_TTC] + weights[3] * row[V1_COMFORT]
        total += weights[4] * row[V1_DDC]
    elif weights[0] == 2.0:
        m = row[V2_NC] * row[V2_DAC] * row[V2_DDC] * row[V2_TLC]
        total = weights[1] * row[V2_EP] + weights[2] * row[V2_TTC] + weights[3] * row[V2_HC] + weights[5] * row[V2_LK]
    else:
        return
    row[REWARD] = m * (total / (weights[1] + weights[2] + weights[3] + weights[4] + weights[5]))
