"""Planners that see vectors and drive the ego: paths, tree search, tokens with a goal. See README.md."""
