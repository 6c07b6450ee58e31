"""Alarms against reward hacking: what is watched, when it rings, and what is done then, each action with its cause.

A rule watches the mean of one number of the record (or of a difference) over the last ``window`` rollouts. While it
stays beyond its threshold it climbs the escalation, one rung per window:

    warn      say so
    raise_bc  add to the weight of behaviour cloning: first ``bc_start``, then times ``bc_factor``, up to ``bc_max``
    stop      end the run; the best checkpoint by held-out score stays

Everything goes to ``alarms.csv``, one row an alarm, also where several ring at one step. The state is part of the
checkpoint.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from navsim_ext.errors import TriviumError
from navsim_ext.runtime.csv_log import CsvLog

log = logging.getLogger(__name__)

Action = Literal["warn", "raise_bc", "stop"]
ACTIONS = ("warn", "raise_bc", "stop")
COLUMNS = ("step", "rollout", "alarm", "action", "cause", "value", "bc_boost")  # of alarms.csv


class AlarmError(TriviumError):
    """A rule that cannot be followed."""


@dataclass(frozen=True)
class AlarmRule:
    """Rings while mean(metric - minus) > above, or < below. ``metric``, ``minus``: keys of the record."""

    metric: str
    minus: str | None = None
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        if (self.above is None) == (self.below is None):
            raise AlarmError(f"rule on {self.metric!r} needs either above or below: {self}")

    @property
    def threshold(self) -> float:
        return self.above if self.above is not None else self.below

    def value(self, record: Mapping[str, float]) -> float:
        """NaN where the record lacks a key."""
        nothing = math.nan
        return record.get(self.metric, nothing) - (record.get(self.minus, nothing) if self.minus else 0.0)

    def rings(self, mean: float) -> bool:
        return mean > self.above if self.above is not None else mean < self.below


class Alarms(Callback):
    """Follows the rules on ``pl_module.record`` and acts on ``pl_module.bc_boost`` and the trainer.

    A metric that no rollout ever reports is an error after the first window, not a rule that sleeps for ever.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        rules: Mapping[str, AlarmRule],
        *,
        window: int = 50,
        escalation: Sequence[Action] = ("warn", "raise_bc", "raise_bc", "stop"),
        bc_start: float = 0.1,
        bc_factor: float = 2.0,
        bc_max: float = 1.0,
    ) -> None:
        unknown = [action for action in escalation if action not in ACTIONS]
        if unknown or not escalation:
            raise AlarmError(f"escalation {list(escalation)} must be made of {', '.join(ACTIONS)}")
        if window < 1:
            raise AlarmError(f"window is {window}; 1 or more rollouts were expected")
        self.path = Path(run_dir) / "alarms.csv"
        self.rules = {name: rule for name, rule in rules.items() if rule is not None}
        self.window, self.escalation = window, tuple(escalation)
        self.bc_start, self.bc_factor, self.bc_max = bc_start, bc_factor, bc_max
        self.recent: dict[str, deque[float]] = {name: deque(maxlen=window) for name in self.rules}
        self.rung = dict.fromkeys(self.rules, 0)
        self.since = 0  # rollouts since the last look
        self.actions: list[dict[str, Any]] = []

    @property
    def can_stop(self) -> bool:
        return "stop" in self.escalation and bool(self.rules)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The table is there from the start: without rows it says that no alarm rang."""
        if trainer.is_global_zero:
            self._table().begin(COLUMNS)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Silence of a run that was too short for any alarm is told from that of a healthy one."""
        rollouts = pl_module.rollout_number + 1
        if self.rules and rollouts < self.window and trainer.is_global_zero:
            log.warning("no alarm could ring: the run made %d rollouts, alarms look at windows of %d (alarms.window)",
                        rollouts, self.window)  # fmt: skip

    def _table(self) -> CsvLog:
        return CsvLog(self.path, identified_by=("step", "alarm"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not pl_module.record:
            return
        for name, rule in self.rules.items():
            value = rule.value(pl_module.record)
            if math.isfinite(value):
                self.recent[name].append(value)
        self.since += 1
        if self.since >= self.window:
            self.since = 0
            for name, rule in self.rules.items():
                self._look(name, rule, trainer, pl_module)

    def _look(self, name: str, rule: AlarmRule, trainer: Trainer, pl_module: LightningModule) -> None:
        values = self.recent[name]
        if not values:
            known = ", ".join(sorted(pl_module.record))
            raise AlarmError(f"alarm {name!r} watches {rule.metric!r} (minus {rule.minus!r}), which no rollout "
                             f"reported; there are: {known}")  # fmt: skip
        mean = sum(values) / len(values)
        if not rule.rings(mean):
            self.rung[name] = 0
            return
        action = self.escalation[min(self.rung[name], len(self.escalation) - 1)]
        self.rung[name] += 1
        self._act(action, pl_module, trainer)
        cause = f"{rule.metric}" + (f" - {rule.minus}" if rule.minus else "")
        sign = ">" if rule.above is not None else "<"
        entry = {"step": pl_module.drawn_at, "rollout": pl_module.rollout_number, "alarm": name, "action": action,
                 "cause": f"{cause} {sign} {rule.threshold}", "value": mean,
                 "bc_boost": pl_module.bc_boost}  # fmt: skip
        self.actions.append(entry)
        log.warning(
            "alarm %s at step %d: mean %s = %.4g %s %.4g over %d rollouts; action: %s (behaviour cloning +%.3g)",
            name, entry["step"], cause, mean, sign, rule.threshold, len(values), action, pl_module.bc_boost,
        )  # fmt: skip
        if trainer.is_global_zero:
            self._table().write(entry)

    def _act(self, action: Action, pl_module: LightningModule, trainer: Trainer) -> None:
        if action == "raise_bc":
            raised = pl_module.bc_boost * self.bc_factor if pl_module.bc_boost else self.bc_start
            pl_module.bc_boost = min(raised, self.bc_max)
        elif action == "stop":
            pl_module.stopped_by_alarm = True
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {
            "recent": {name: list(values) for name, values in self.recent.items()},
            "rung": dict(self.rung),
            "since": self.since,
            "actions": [dict(entry) for entry in self.actions],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.since = int(state_dict["since"])
        self.actions = [dict(entry) for entry in state_dict["actions"]]
        for name in self.rules.keys() & state_dict["recent"].keys():
            self.recent[name].extend(state_dict["recent"][name])
            self.rung[name] = int(state_dict["rung"][name])
