"""The one root of all errors that Trivium raises on purpose.

Failure is never data: a message names the file, the key, both values and the remedy. Concrete errors live
beside the concept they belong to and derive from :class:`TriviumError`, so a command line can tell them from bugs.
"""


class TriviumError(Exception):
    """Something the user can act on: the message says what is wrong, where, and what to do."""

    exit_code = 2  # of a command line that ends with it


class DataError(TriviumError, ValueError):
    """Input data that breaks its contract (shape, range, finiteness, consistency)."""


class MissingError(TriviumError, FileNotFoundError):
    """A file, token or field that should be there is not."""


class CorruptFile(TriviumError):
    """Bytes on disk are not the bytes that were written: a flipped bit, a file cut short, or another in its place."""


class NotFiniteLoss(TriviumError):
    """Training met a loss or gradient that is NaN or infinite; the message names what of the batch was not finite."""
