"""pdm package."""
