"""CSV tables that survive kill -9 and resume: appended row by row, cut back to the checkpoint when a run continues.

Lightning's CSVLogger deletes what was there when it opens the folder again; here history is kept.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from navsim_ext.errors import CorruptFile
from navsim_ext.files import atomic_file, reading

REMEDY = "restore it, or delete it: the run goes on, without the rows before"


class CsvLog:
    """One table with a ``step`` column; columns may appear later (the file is then rewritten atomically).

    ``identified_by``: columns whose values tell two rows apart; without it the step and the names of the columns that
    have a value do (the numbers of a training step and those of a validation at the same step are two rows).
    """

    def __init__(self, path: str | os.PathLike[str], identified_by: Sequence[str] = ()) -> None:
        self.path, self.identified_by = Path(path), tuple(identified_by)
        self.columns: list[str] = []
        self._seen: set[tuple[str, ...] | tuple[str, frozenset[str]]] = set()
        self._cut_short = False  # the last line, by a crash
        if self.path.is_file():
            self.columns = self._header()
            self._seen = {self._key(row) for row in self.read()}
            self._cut_short = self.path.read_bytes()[-1:] not in (b"", b"\n")

    def begin(self, columns: Sequence[str]) -> None:
        """Makes the table with these columns and no row, unless it is there."""
        if not self.columns:
            self.columns = list(columns)
            self._rewrite([])

    def _header(self) -> list[str]:
        with reading(self.path, REMEDY), open(self.path, newline="") as stream:
            return next(csv.reader(stream), [])

    def read(self) -> list[dict[str, str]]:
        """All complete rows, as text; a last line that a crash cut short is left out.

        Raises CorruptFile for a row that has more or fewer values than there are columns, or no step.
        """
        with reading(self.path, REMEDY):
            text = self.path.read_text()
            rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
        known = set(self.identified_by or ("step",))
        for number, row in enumerate(rows, start=1):
            whole = None not in row and None not in row.values() and known <= row.keys()
            if not whole or not row.get("step", "0").isdecimal():
                raise CorruptFile(f"{self.path}: row {number} is not as it was written ({row!s:.200}): {REMEDY}")
        return rows

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row; one with the step and columns of an earlier row (a replay after a resume) is dropped."""
        key = self._key(row)
        if key in self._seen:
            return
        self._seen.add(key)
        new = [column for column in row if column not in self.columns]
        if new or self._cut_short:
            rows = self.read() if self.path.is_file() else []
            self.columns += new
            self._rewrite([*rows, row])
            self._cut_short = False
            return
        with open(self.path, "a", newline="") as stream:
            csv.DictWriter(stream, self.columns, restval="").writerow(row)

    def truncate(self, step: int) -> None:
        """Removes the rows of ``step`` and later: they belong to work that will be done again."""
        if not self.path.is_file():
            return
        rows = [row for row in self.read() if int(row["step"]) < step]
        self._seen = {self._key(row) for row in rows}
        self._rewrite(rows)
        self._cut_short = False

    def _key(self, row: Mapping[str, Any]) -> tuple[str, ...] | tuple[str, frozenset[str]]:
        if self.identified_by:
            return tuple(str(row[name]) for name in self.identified_by)
        return str(row["step"]), frozenset(name for name, value in row.items() if value not in ("", None))

    def _rewrite(self, rows: list[Any]) -> None:
        with atomic_file(self.path) as temporary, open(temporary, "w", newline="") as stream:
            writer = csv.DictWriter(stream, self.columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


class MetricsCsv(Logger):
    """Lightning logger: ``<run_dir>/metrics.csv`` (one row per logged step)."""

    FILE_NAME = "metrics.csv"

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        super().__init__()
        self.run_dir = Path(run_dir)
        self._table: CsvLog | None = None

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return self.run_dir.name

    @property
    def save_dir(self) -> str:
        return str(self.run_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> CsvLog:
        if self._table is None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._table = CsvLog(self.run_dir / self.FILE_NAME)
        return self._table

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step if step is not None else 0}
        self.experiment.write(row | {name: f"{float(value):.9g}" for name, value in metrics.items()})

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: :func:`navsim_ext.runtime.run.run` writes ``hparams.yaml`` from the configuration."""
