"""Files that are there whole or not at all, also across a crash: the one way in which Trivium writes a file anew. And
what is asked of files and names that others made.

    with atomic_file(path) as temporary:      # any writer that takes a path
        table.to_parquet(temporary)
    with atomic_stream(path) as stream:       # any writer that takes a binary stream
        np.save(stream, array)
    write_atomic(path, content)               # bytes or text
    write_json_atomic(path, content)          # JSON, keys sorted

    with reading(path):                       # any library that reads a file: its errors become ours
        frame = pd.read_parquet(path)
    plain_name(name, "name="), inside(path, "cams.data_path")   # names and paths out of data or options

A reader sees the old file or the new one. kill -9 leaves at most a temporary file ``.NAME.*.tmp`` beside the target;
:func:`remove_temporaries` takes it away, for whoever knows that nobody else is writing: taking a folder's lock alone
(``navsim_ext/runtime/lock.py``) does it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from navsim_ext.errors import CorruptFile, DataError, MissingError, TriviumError

MAX_NAME_BYTES = 150  # leaves room for what we add; file systems end at 255
FULL = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY = re.compile(r"\..*\.tmp(\.\w+)?(-journal|-wal|-shm)?")  # with what SQLite puts beside a half GeoPackage
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class CannotWrite(TriviumError, OSError):
    """A place refuses to take a file: full disk, no permission, too long a name."""

    def __str__(self) -> str:
        return str(self.args[0])


def cannot_write(error: OSError, target: str | os.PathLike[str]) -> CannotWrite:
    """The error that a user can act on, of one that the operating system gave while ``target`` was written."""
    if error.errno in FULL:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(_existing(Path(target))).free / 2**20
            return _refusal(
                error,
                f"cannot write {target}: the disk is full ({free:.0f} MiB free): make room or choose another "
                "output_dir, then run the same command again: what is finished is kept",
            )
    if error.errno in FORBIDDEN:
        return _refusal(error, f"cannot write {target}: the folder is not writable: choose another output_dir")
    return _refusal(error, f"cannot write {target}: {error.strerror or error}: choose another output_dir")


@contextlib.contextmanager
def disk_errors(target: str | os.PathLike[str]) -> Iterator[None]:
    """Within the block, what the operating system says of the disk (full, not writable) becomes CannotWrite."""
    try:
        yield
    except TriviumError:
        raise
    except OSError as error:
        if error.errno in (*FULL, *FORBIDDEN):
            raise cannot_write(error, target) from error
        raise


@contextlib.contextmanager
def atomic_file(
    path: str | os.PathLike[str], *, workshop: Path | None = None, durable: bool = True, suffix: str = ".tmp"
) -> Iterator[Path]:
    """Yields a path to write to; when the block ends well, the file takes its name, and otherwise it is removed.

    Args:
        path: where the file is to be; its folder is made.
        workshop: folder of the half-written file on the same file system, made too; beside the target by default.
        durable: flush to disk before renaming, so that a power cut finds a whole file too (kill -9 always does).
        suffix: end of the temporary name, for writers that insist on one.

    Raises CannotWrite for a full disk or a folder that takes no file.
    """
    target = Path(path)
    folder = target.parent if workshop is None else workshop
    temporary = folder / f".{target.name}.{os.getpid()}-{secrets.token_hex(3)}{suffix}"
    with disk_errors(target):
        try:
            for needed in {target.parent, folder}:
                _make_folder(needed, target)
            yield temporary
            if durable:
                with open(temporary, "rb") as stream:
                    os.fsync(stream.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_stream(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[BinaryIO]:
    """As :func:`atomic_file`, with an open binary stream."""
    with atomic_file(path, durable=durable) as temporary, open(temporary, "wb") as stream:
        yield stream


def write_atomic(
    path: str | os.PathLike[str], content: bytes | str, *, workshop: Path | None = None, durable: bool = True
) -> None:
    """Puts bytes, or text in UTF-8, at ``path``: see :func:`atomic_file`."""
    with atomic_file(path, workshop=workshop, durable=durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json_atomic(path: str | os.PathLike[str], content: Any, finish: Callable[[Path], None] | None = None) -> None:
    """Writes JSON with sorted keys: see :func:`atomic_file`. ``finish`` may change the file before it gets its name."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        if finish is not None:
            finish(temporary)


def read_json(path: str | os.PathLike[str], remedy: str = "restore it or make it again") -> Any:
    """The content of a JSON file. Raises MissingError for none, CorruptFile naming one that cannot be read."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise MissingError(f"{path} is missing: {remedy}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CorruptFile(f"{path} is no readable JSON ({error}): it is damaged; {remedy}") from error


@contextlib.contextmanager
def reading(
    path: str | os.PathLike[str], remedy: str = "copy or download it again", kind: type[TriviumError] = CorruptFile
) -> Iterator[None]:
    """Around a library's reading of a file of unknown origin: what it says becomes MissingError or ``kind``.

    Libraries raise what they happen to meet (KeyError, struct.error, RuntimeError, plain Exception); so the block holds
    the reading alone, none of our own work on what was read. Errors of ours pass.
    """
    try:
        yield
    except TriviumError:
        raise
    except FileNotFoundError as error:
        raise MissingError(f"{path} does not exist: {remedy}") from error
    except Exception as error:
        raise kind(f"{path} cannot be read ({type(error).__name__}: {error!s:.300}): {remedy}") from error


def plain_name(name: str, what: str) -> str:
    """``name`` if it can be a file's name in the folder it is meant for; raises DataError for a path, or nothing."""
    if not isinstance(name, str) or not name.strip() or len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        raise DataError(f"{what} is {name!r:.80}; a name of 1 to {MAX_NAME_BYTES} bytes was expected")
    if name in (".", "..") or any(part in name for part in ("/", "\\", "\0")) or not name.isprintable():
        raise DataError(f"{what} is {name!r:.80}; a name was expected, not a path: leave out separators")
    return name


def inside(path: str, what: str) -> str:
    """``path`` if it is relative and stays below the folder it starts at; raises DataError otherwise.

    Judged by the text alone: links that the user put into the folder are followed, as data sets are often joined by
    them.
    """
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise DataError(f"{what} is {path!r:.120}; a relative path was expected")
    depth = 0
    for part in path.replace("\\", "/").split("/"):
        depth += -1 if part == ".." else 0 if part in ("", ".") else 1
        if depth < 0:
            break
    if depth <= 0 or path.startswith(("/", "\\")) or path[1:2] == ":":
        raise DataError(f"{what} is {path!r:.120}, which leads out of its folder; a relative path was expected")
    return path


def remove_temporaries(folder: str | os.PathLike[str]) -> None:
    """Removes what killed writers left in a folder; only for whoever knows that nobody is writing there."""
    for path in Path(folder).glob(".*.tmp*"):
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _make_folder(folder: Path, target: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(error, target) from error


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _refusal(error: OSError, message: str) -> CannotWrite:
    refusal = CannotWrite(message)
    refusal.errno = error.errno
    return refusal
