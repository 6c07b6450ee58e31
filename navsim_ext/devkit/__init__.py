"""The bridge to NAVSIM's own program: its agents, its submissions, its metric caches. See README.md."""
