"""What the words of a score table mean, one sentence each: for the foot of the report and the tips on its headers."""

from __future__ import annotations

from navsim_ext.evaluation.table import TITLES

TERMS = {
    "PDMS": "Predictive Driver Model Score of NAVSIM v1.1: NC x DAC x (5 EP + 5 TTC + 2 C) / 12, from 0 to 100.",
    "EPDMS": "Extended PDMS of NAVSIM v2.2: NC x DAC x DDC x TLC x (5 EP + 5 TTC + 2 LK + 2 HC + 2 EC) / 16.",
    "human filter": "A sub-score that the recorded human driver fails too counts as passed. "
    "'No filter' is the score without this forgiveness.",
    "NC": "No at-fault collision: 100 without one, 50 for one with a static object, 0 otherwise.",
    "DAC": "Drivable area compliance: 100 where all corners of the car stay on the drivable area, otherwise 0.",
    "DDC": "Driving direction compliance: 100, 50 or 0 by the distance driven into oncoming traffic.",
    "TLC": "Traffic light compliance: 0 where a red light is passed.",
    "EP": "Ego progress along the route, as a share of what the reference planner PDM-Closed reaches.",
    "TTC": "Time to collision: 0 where the car, going on as it does, would hit something within a second.",
    "C": "Comfort: 100 where accelerations, jerks and yaw rates stay within NAVSIM's limits.",
    "LK": "Lane keeping: 0 where the car stays too far from the lane's centre line for too long.",
    "HC": "History comfort: comfort of the plan joined to what was driven before.",
    "EC": "Extended comfort: whether two plans made half a second apart agree.",
    "token": "The name of one scene: the moment at which a planner is asked.",
    "log": "One recorded drive. Scenes of one log resemble each other, so intervals are drawn over whole logs.",
    "invalid": "Scenes that could not be scored. They enter no mean.",
    "judge": "A second score that watches the one that is trained on: where only the trained one rises, "
    "the reward is being exploited.",
    "human": "The recorded drive itself, scored like a plan.",
}


def meaning(column: str) -> str:
    """The sentence of a score column (a key of ``TITLES``) or of a term; KeyError for what the glossary lacks."""
    title = TITLES.get(column, column)
    return TERMS[title.split(",")[0].split(" v")[0]]
