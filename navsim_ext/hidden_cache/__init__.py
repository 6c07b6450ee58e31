"""hidden_cache package."""
