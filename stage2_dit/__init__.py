"""stage2_dit package."""
