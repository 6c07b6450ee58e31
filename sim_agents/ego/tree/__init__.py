"""The tree planner: a search over drivable templates in a learned model of the world."""
