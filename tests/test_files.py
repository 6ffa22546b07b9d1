"""files.py: what is read is refused in a sentence, what is written is complete or not there, and no link that somebody
planted is followed."""

import errno
import fcntl
import hashlib
import os
import threading
import time
import zlib
from pathlib import Path

import pytest

from notus import files
from notus.files import (
    checksum,
    file_digest,
    lock,
    parse_json,
    read_bytes,
    read_json,
    sentence,
    set_aside,
    text_digest,
    write_atomically,
)

# --- JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": }', ":1: not JSON: Expecting value at column 7"),
        (b'{"a": 1,\n "b" 2}', ":2: not JSON: Expecting ':' delimiter at column 6"),
        (b"", ":1: not JSON: Expecting value at column 1"),
        (b'{"a": 1}\n{"a": 2}\n', ":2: not JSON: Extra data at column 1"),
        (b'{"a": ' + b"[" * 100_000, ":1: not JSON that can be read: it is nested too deeply"),
        (b'{"a": ' + b"7" * 5000 + b"}", ":1: not JSON that can be read: Exceeds the limit"),
        (b'{"a": 1,\n "b": "\xe9"}', ":2: not UTF-8 text: invalid continuation byte; save it as UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', ":1: not UTF-8 text: invalid continuation byte"),  # half of a surrogate pair
        (b'{"a": "\\ud83d", "b": 1}', ": holds '\\ud83d', half of a surrogate pair, which is no text"),
        (b'{"a\\uDE00": 1}', ": holds '\\ude00', half of a surrogate pair, which is no text"),
        (b'\xef\xbb\xbf{"a": 1}', ":1: not JSON: Unexpected UTF-8 BOM"),  # which no Hugging Face tool reads
        ('{"a": 1}'.encode("utf-16"), ": looks like UTF-16 text; save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16-be"), ": looks like UTF-16 text; save it as UTF-8"),
        ('{"a": 1}'.encode("utf-32-le"), ": looks like UTF-16 text; save it as UTF-8"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            ": a git-lfs pointer, not the file itself. Run `git lfs pull`",
        ),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', ":1: not JSON that can be read: an object has the key 'c' twice"),
        (b"[1, 2]", ": must hold a JSON object, not [1, 2]"),
        (b"null", ": must hold a JSON object, not None"),
        (b"[" + b"7," * 500 + b"7]", f": must hold a JSON object, not {str([7] * 30)[:80]}"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_file_that_holds_no_json_object_is_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}{message}") and len(str(caught.value)) < 300


def test_lines_are_counted_from_where_the_text_begins():
    for line, message in ((1, "a.json:3: not JSON"), (7, "a.json:9: not JSON")):
        with pytest.raises(ValueError, match=message):
            parse_json('{\n"a":\n}', "a.json", line)


def test_a_json_object_is_read(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": "\xc3\xa9", "b": "\\ud83d\\ude00 \\\\ud83d"}')
    assert read_json(path) == {"a": "é", "b": "\U0001f600 \\ud83d"}
    assert read_json(tmp_path / "absent.json") == {}


def test_a_file_too_large_and_a_link_to_nowhere_are_refused(tmp_path: Path):
    with (tmp_path / "sparse.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError) as caught:
        read_json(tmp_path / "sparse.json")
    assert str(caught.value).endswith("sparse.json: has 1,099,511,627,776 bytes; such a file has at most 268,435,456")
    for name in ("loop.json", "dangling.json"):
        (tmp_path / name).symlink_to("loop.json" if name == "loop.json" else "nowhere")
        with pytest.raises(ValueError, match=f"{name}: cannot be read: "):
            read_json(tmp_path / name)


def test_what_is_no_file_is_refused_and_nothing_waits_for_a_pipe(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        for read in (read_json, read_bytes):
            with pytest.raises(ValueError) as caught:
                read(path)
            assert str(caught.value) == f"{path}: not a regular file"
        with pytest.raises(ValueError) as caught:
            file_digest(path)
        assert str(caught.value) == f"{path}: not a regular file"
    with pytest.raises(ValueError) as caught:
        read_bytes(tmp_path / "absent")
    assert str(caught.value) == f"{tmp_path / 'absent'}: cannot be read: No such file or directory"


def test_an_error_is_printed_on_one_screen_without_control_characters():
    assert sentence(ValueError("a é\n\x1b[31m\u202e🙂\udcff")) == r"a é\n\x1b[31m\u202e🙂\udcff"
    assert sentence(OSError(2, "No such file or directory", "x")) == "x: No such file or directory"
    assert sentence(OSError(21, "Is a directory", "x.tmp", None, "x")) == "x: Is a directory"
    assert sentence(OSError(28, "No space left on device")) == "[Errno 28] No space left on device"
    assert sentence(OSError(36, "File name too long", "x" * 900)).startswith("xxx")
    assert len(sentence("x" * 5000 + ": no such file")) == 857 and sentence("x" * 5000 + "y: no").endswith("xy: no")


# --- digests -------------------------------------------------------------------------------------------------------


def test_digests_and_checksums_are_those_of_the_content(tmp_path: Path):
    path, content = tmp_path / "a", os.urandom(1000) * 17_000  # 17 MB: more than one block
    path.write_bytes(content)
    assert file_digest(path) == file_digest(str(path)) == hashlib.sha256(content).hexdigest()
    assert checksum(path) == [len(content), zlib.crc32(content)]
    path.write_bytes(b"")
    assert checksum(path) == [0, 0]
    assert text_digest("é") == hashlib.sha256("é".encode()).hexdigest()
    with pytest.raises(ValueError, match="absent: no such file"):
        file_digest(tmp_path / "absent")
    assert checksum(tmp_path / "absent") == checksum(tmp_path) == [-1, 0]


# --- writing -------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced(tmp_path: Path):
    path = tmp_path / "status.json"
    for text in ("first", "the second, é", ""):
        write_atomically(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fails", ["write", "fsync", "rename"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch, fails: str):
    path = tmp_path / "status.json"
    write_atomically(path, "old")

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    text = "new"
    with monkeypatch.context() as patch:
        if fails == "fsync":
            patch.setattr(files.os, "fsync", full)
        if fails == "rename":
            patch.setattr(Path, "replace", full)
        if fails == "write":
            text = "new\ud83d"  # no UTF-8, found only while writing
        with pytest.raises((OSError, UnicodeEncodeError)):
            write_atomically(path, text)
    assert path.read_text() == "old"
    write_atomically(path, "new")  # what the failure left is not in the way
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_the_text_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch):
    order, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(files.os, "fsync", lambda file: (order.append("sync"), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda *paths: (order.append("rename"), replace(*paths)))
    write_atomically(tmp_path / "a", "text")
    assert order == ["sync", "rename", "sync"]  # the file, its name, the folder that holds the name


def test_a_planted_link_is_replaced_and_not_followed(tmp_path: Path):
    victim, path = tmp_path / "victim", tmp_path / "status.json"
    victim.write_text("untouched")
    for link in (path, tmp_path / "status.json.tmp"):
        link.symlink_to(victim)
        write_atomically(path, "new")
        assert victim.read_text() == "untouched"
        assert path.read_text() == "new" and not path.is_symlink()
        assert not (tmp_path / "status.json.tmp").is_symlink()


def test_a_link_planted_at_the_last_moment_is_not_followed(tmp_path: Path, monkeypatch):
    victim, building = tmp_path / "victim", tmp_path / "status.json.tmp"
    victim.write_text("untouched")
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: building.symlink_to(victim))
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "status.json", "new")
    assert victim.read_text() == "untouched"


def test_damaged_files_and_folders_get_names_of_their_own(tmp_path: Path):
    path = tmp_path / "step-[1]"

    def again() -> Path:
        path.mkdir()
        (path / "shard").touch()
        return set_aside(path)

    names = ("step-[1].damaged", "step-[1].damaged-2", "step-[1].damaged-3")
    assert [again().name for _ in names] == list(names)
    assert not path.exists() and {p.name for p in tmp_path.iterdir()} == set(names)
    (tmp_path / names[0] / "shard").unlink()
    (tmp_path / names[0]).rmdir()  # to make room
    assert [again().name for _ in range(2)] == [names[0], "step-[1].damaged-4"]
    path.write_text("a file")
    assert set_aside(path).read_text() == "a file"


# --- locks ---------------------------------------------------------------------------------------------------------


def test_a_second_holder_is_refused_or_waits(tmp_path: Path):
    path, order = tmp_path / "lock", []

    def wait() -> None:
        with lock(path):
            order.append("second")

    with lock(path):
        with pytest.raises(BlockingIOError), lock(path, wait=False):
            pytest.fail("locked twice")
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    with lock(path, wait=False):
        pass


def test_a_lock_ends_with_its_process(tmp_path: Path):
    child = os.fork()
    if child == 0:
        with lock(tmp_path / "lock"):
            os._exit(0)
    os.waitpid(child, 0)
    with lock(tmp_path / "lock", wait=False):
        pass


@pytest.mark.parametrize("wait", [True, False])
def test_without_locks_there_is_a_warning_and_work_goes_on(tmp_path: Path, monkeypatch, wait: bool):
    def flock(*_) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning) as caught, lock(tmp_path / "lock", wait=wait):
        pass
    assert str(caught[0].message) == (
        f"{tmp_path / 'lock'}: this file system has no locks (Function not implemented); do not start two runs in one "
        "folder"
    )
    assert caught[0].filename == __file__


def test_a_link_in_place_of_a_lock_file_is_not_followed(tmp_path: Path):
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="cannot be used as a lock file"), lock(tmp_path / "lock"):
        pytest.fail("locked")
    assert not (tmp_path / "victim").exists()
