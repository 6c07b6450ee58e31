"""metric_cache package."""
