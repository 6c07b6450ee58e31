"""The path planner: a network gives waypoints, and a Gaussian policy drives towards the first."""
