"""ScenarioNet map features -> VectorMap."""

STATED_LINES: dict[int, tuple[bool, bool]] = {}
