"""Files: JSON in, digests, writes that are complete or not there at all, locks between processes.

Every error is a ValueError that names the file. A name that is being replaced is never opened through a symbolic link.
"""

import fcntl
import hashlib
import json
import os
import site
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

# Where train.py, binarize.py, audit.py and configs/ are: in the checkout, or where a wheel puts them (setup.cfg).
SHARED = next(
    (path for path in (Path(__file__).parent.parent, Path(site.USER_BASE or ".") / "share" / "notus")
     if (path / "train.py").is_file()),
    Path(sys.prefix) / "share" / "notus",
)  # fmt: skip
MAX_BYTES = 1 << 28  # of a file that is read at once; the largest tokenizer files in use have about 35 MB


def parse_json(text: str | bytes, path: str | Path, line: int = 1) -> Any:
    """The value of a JSON text that begins in `line` of a file. ValueError names both, whatever is wrong with it.

    Bytes must be UTF-8. A key that an object holds twice is refused, because programs differ in which one they take.
    """
    try:
        if isinstance(text, bytes):  # json.loads would take UTF-16, which other tools do not
            text = text.decode()
        return json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"{path}:{line}: not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:  # not UTF-8, a number of more than 4,300 digits, or a repeated key
        raise ValueError(f"{path}:{line}: not JSON that can be read: {error}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has the key {next(key for key in keys if keys.count(key) > 1)!a:.80} twice")
    return found


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a file. ValueError for anything else, because reading a pipe or a device could last forever."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: not a regular file")
        if (size := path.stat().st_size) > max_bytes:
            raise ValueError(f"{path}: has {size:,} bytes; such a file has at most {max_bytes:,}")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    refuse_pointer(path, data)
    return data


def refuse_pointer(path: Path, head: bytes) -> None:
    """ValueError if this is the beginning of what git-lfs leaves in place of a file."""
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path}: a git-lfs pointer, not the file itself. Run `git lfs pull` in {path.parent}, or download it with "
            "`hf download`"
        )


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """The content of a text file in UTF-8. A byte order mark stays in it."""
    data = read_bytes(path, max_bytes)
    if is_utf16(data[:4]):
        raise ValueError(f"{path}: looks like UTF-16 text; save it as UTF-8")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text: {error.reason}; save it as UTF-8") from None


def is_utf16(head: bytes) -> bool:
    """Whether the first four bytes of a text are those of UTF-16 or UTF-32, with a byte order mark or without."""
    return head.startswith((b"\xff\xfe", b"\xfe\xff")) or 0 < head.count(0) < 4


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    if not os.path.lexists(path):  # a link to nowhere is an error
        return {}
    text = read_text(path)
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {value!r:.80}")
    try:
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{path}: holds {half!a}, half of a surrogate pair, which is no text") from None
    return value


def sentence(error: object) -> str:
    """An error as it is printed: on one screen, and with no control characters, which a file's name may hold."""
    text = str(error)  # of an OSError: [Errno 2] No such file or directory: 'path'
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename2 or error.filename}: {error.strerror}"
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 900 else f"{text[:600]} [...] {text[-250:]}"


def file_digest(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal."""
    if not Path(path).is_file():  # opening a pipe would wait forever
        raise ValueError(f"{path}: {'not a regular file' if Path(path).exists() else 'no such file'}")
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """sha256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def checksum(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file; [-1, 0] if it cannot be read."""
    size = crc = 0
    if not path.is_file():  # opening a pipe would wait forever
        return [-1, 0]
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
    try:
        with building.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        building.replace(path)
    except OSError:  # a full disk needs the room
        building.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to NAME.damaged, NAME.damaged-2, ..., the first that is free; the new name."""
    names = (f"{path.name}.damaged" + (f"-{number}" if number > 1 else "") for number in count(1))
    aside = next(aside for aside in map(path.with_name, names) if not aside.exists())
    path.replace(aside)
    return aside


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be made a folder: {error.strerror}") from None


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock file against other processes. It is released when the process ends, however it ends.

    With `wait=False` BlockingIOError is raised if another process holds it. A file system without locks (Lustre
    mounted without `-o flock`, some NFS) gives a warning, and work goes on without one.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise ValueError(f"{path}: cannot be used as a lock file: {error.strerror}") from None
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
