"""The token planner: a traffic model that is told where its ego wants to go."""
