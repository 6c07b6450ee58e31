"""Reinforcement of policies: what others may use of this package is its commands."""

import navsim_ext  # noqa: F401 - answers --help before a command loads anything
