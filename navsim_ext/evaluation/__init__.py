"""Planners are scored, compared and shown; every table says what made its numbers. See README.md."""
