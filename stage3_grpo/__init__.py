"""stage3_grpo package."""
