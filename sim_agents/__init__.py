"""Traffic models: road users that choose a motion token each half second."""

import navsim_ext  # noqa: F401 - answers --help before a command loads anything
