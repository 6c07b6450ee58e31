"""Stage 1: the vision-language model that answers driving questions, and its hidden states."""

import navsim_ext  # noqa: F401 - answers --help before a command loads anything
