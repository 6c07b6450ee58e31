"""The sim-agents realism metrics of 2023, 2024 and 2025, equal to the challenge's own code and a hundred times as
fast."""
