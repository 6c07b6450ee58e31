"""The moving world: batched scenes, policies, a planner in the ego's seat."""
