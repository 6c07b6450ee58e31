"""One scene and its rollouts in, the challenge's figures out."""

from __future__ import annotations

from dataclasses import dataclass

from navsim_ext.realism.features import Features, Scenario, log_features, rollout_features
from navsim_ext.realism.likelihood import scenario_metrics
from navsim_ext.realism.rollouts import Rollouts, world_states
from navsim_ext.realism.rules import CHALLENGE_ROLLOUTS, Rules, rules_of
from navsim_ext.realism.scenario import Listed, listed, scenario_of
from navsim_ext.traffic.scene import TrafficScene

CLEAN = "metametric_without_listed"
"""The additional figure: the meta-metric without the scored objects whose recording itself breaks the rules."""


@dataclass(frozen=True)
class Realism:
    """Figures of one scene. ``metrics``: the challenge's names; ``clean``: the meta-metric without the listed
    objects, NaN where none is left; ``scored`` objects and how many of them are ``clean``."""

    name: str
    metrics: dict[str, float]
    clean: float
    scored: int
    listed: Listed


def realism(
    scene: TrafficScene, rollouts: Rollouts, *, year: int = 2025, expected: int | None = CHALLENGE_ROLLOUTS
) -> Realism:
    """Scores the rollouts of one scene by one year's rules.

    ``expected`` is the number of rollouts that there must be (32 in the challenge; None takes any). Raises
    RealismError for scenes or rollouts that the rules do not admit. A likelihood without any valid step is NaN, and
    so is the meta-metric.
    """
    rules = rules_of(year)
    scenario = scenario_of(scene)
    log = log_features(scenario)
    simulated = rollout_features(scenario, world_states(scenario, scene, rollouts, expected))
    return _figures(scenario, log, simulated, rules)


def _figures(scenario: Scenario, log: Features, simulated: Features, rules: Rules) -> Realism:
    faults = listed(scenario)
    metrics = scenario_metrics(scenario, log, simulated, rules)
    clean = metrics if faults.clean.all() else scenario_metrics(scenario, log, simulated, rules, faults.clean)
    return Realism(scenario.identifier, metrics, clean["metametric"], scenario.scored, faults)
