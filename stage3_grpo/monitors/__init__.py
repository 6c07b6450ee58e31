"""What is recorded of every step, and what is done when it looks wrong."""

from stage3_grpo.monitors.alarms import AlarmRule, Alarms
from stage3_grpo.monitors.recorder import FlightRecorder
from stage3_grpo.monitors.statistics import credit_statistics

__all__ = ["AlarmRule", "Alarms", "FlightRecorder", "credit_statistics"]
