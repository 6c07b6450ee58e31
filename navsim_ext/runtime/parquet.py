"""Tables on disk: Parquet files that are there whole or not at all, and that say what their bytes are.

The checksum stands in the schema's metadata under ``trivium_checksum``; any Parquet reader can read the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from navsim_ext.errors import CorruptFile, DataError
from navsim_ext.files import atomic_file
from navsim_ext.runtime.checksums import PLACE, check_stamp, stamp

METADATA_KEY = b"trivium_checksum"


def write_table(
    path: str | os.PathLike[str], table: pd.DataFrame | pa.Table, metadata: Mapping[bytes, str] | None = None
) -> None:
    """Writes a table atomically, stamped; ``metadata`` goes into the schema beside what is there."""
    arrow = pa.Table.from_pandas(table, preserve_index=False) if isinstance(table, pd.DataFrame) else table
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), **(metadata or {}), METADATA_KEY: PLACE})
    with atomic_file(path) as temporary:
        pq.write_table(arrow, temporary)
        stamp(temporary)


def read_table(path: str | os.PathLike[str], remedy: str, *, required: bool = True) -> pa.Table:
    """The table of a file, after comparing its checksum. Raises MissingError, CorruptFile.

    ``required=False`` accepts a file without one, which somebody else wrote.
    """
    check_stamp(path, remedy, required=required)
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptFile(f"{path} is no readable Parquet file ({error}); {remedy}") from error


def require_columns(path: str | os.PathLike[str], present: Iterable[str], wanted: Iterable[str], remedy: str) -> None:
    """Raises DataError naming the columns that a table lacks, in quotes, and those that it has."""
    present = list(present)
    missing = [name for name in wanted if name not in present]
    if missing:
        word = "column" if len(missing) == 1 else "columns"
        raise DataError(
            f"{path} lacks the {word} {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, present)) or 'none'}: {remedy}"
        )


def read_frame(path: str | os.PathLike[str], remedy: str) -> pd.DataFrame:
    """As :func:`read_table`, as a DataFrame."""
    return read_table(path, remedy).to_pandas()
