"""The error of settings."""

from navsim_ext.errors import TriviumError


class AlgorithmError(TriviumError):
    """A setting that is out of range, contradicts another, or would have no effect."""
