"""Reasons for a decision, put together from what is known about the scene: one or two sentences.

These are the words of a program, marked as such in every record (``reasoning_source``). They teach a small model the
form of a reply and where to look; nothing about distilling the reasoning of a large model can be concluded from them.
"""

from __future__ import annotations

from navsim_ext.questions.facts import Facts

SOURCE = "facts"  # of a record's reasoning
CLOSE_LEAD_M = 25.0
_SPEED = {
    "KEEP": "keep our speed",
    "ACCELERATE": "accelerate",
    "DECELERATE": "slow down",
    "STOP": "stop",
}
_PATH = {
    "STRAIGHT": "stay in our lane",
    "LEFT_TURN": "turn left",
    "RIGHT_TURN": "turn right",
    "LEFT_CHANGE": "change to the left lane",
    "RIGHT_CHANGE": "change to the right lane",
}


def reasoning_from_facts(facts: Facts) -> str:
    """What is seen that bears on the decision, then the decision: ``The light is red, so we stop and ...``."""
    seen = []
    if facts.light in ("red", "green"):
        seen.append(f"the light is {facts.light}")
    if facts.pedestrian == "road":
        seen.append("a pedestrian is on the road")
    if facts.lead is not None and facts.lead.gap < CLOSE_LEAD_M:
        braking = " and brakes" if facts.lead.braking else ""
        seen.append(f"the car ahead is {'near' if facts.lead.gap < 10.0 else 'close'}{braking}")
    elif facts.lead_known and facts.lead is None:
        seen.append("no car is ahead")
    if not seen:
        seen.append("nothing ahead asks for more")
    found = ", ".join(seen[:-1]) + (" and " if len(seen) > 1 else "") + seen[-1]
    return f"{found[0].upper()}{found[1:]}, so we {_SPEED[facts.decision.speed]} and {_PATH[facts.decision.path]}."
