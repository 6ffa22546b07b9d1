"""Files: JSON in, digests, writes that are complete or not there at all, locks between processes.

Every error is a ValueError that names the file. A name that is being replaced is never opened through a symbolic link.
"""

import fcntl
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text. ValueError begins with `where`, whatever is wrong with the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if error.lineno > 1 else ""
        raise ValueError(f"{where}{line}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{where}: not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:  # not UTF-8, or a number of more than 4,300 digits
        raise ValueError(f"{where}: not JSON that can be read: {error}") from None


def read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait forever
            raise ValueError(f"{path}: not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    if not path.exists():
        return {}
    value = parse_json(read_bytes(path), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {value!r:.80}")
    return value


def file_digest(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """sha256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def checksum(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file; [-1, 0] if it cannot be read."""
    size = crc = 0
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 24):  # zlib lets other threads run meanwhile
                size, crc = size + len(block), zlib.crc32(block, crc)
    except OSError:
        return [-1, 0]
    return [size, crc]


def fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file completely or not at all: write under a temporary name, sync to the disk, rename."""
    building = path.with_name(path.name + ".tmp")
    building.unlink(missing_ok=True)  # left by a kill, or a link that someone planted
    with building.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    building.replace(path)
    fsync(path.parent)


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to NAME.damaged, NAME.damaged-2, ...; the new name."""
    number = 1 + len(list(path.parent.glob(f"{path.name}.damaged*")))
    aside = path.with_name(f"{path.name}.damaged" + (f"-{number}" if number > 1 else ""))
    path.replace(aside)
    return aside


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock file against other processes. It is released when the process ends, however it ends.

    With `wait=False` BlockingIOError is raised if another process holds it. A file system without locks (Lustre
    mounted without `-o flock`, some NFS) gives a warning, and work goes on without one.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            warnings.warn(
                f"{path}: this file system has no locks ({error.strerror}); do not start two runs in one folder",
                stacklevel=3,
            )
        yield
    finally:
        os.close(descriptor)
