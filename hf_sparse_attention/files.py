"""Files and folders that exist whole or not at all: written under a temporary name beside their place, put on disk,
then renamed. A leaf."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"


@contextmanager
def whole_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives an empty temporary folder; when the block ends without an error it becomes `path`.

    Args:
        replace: whether a folder that is already at `path` gives way; otherwise only an empty one does.

    Raises:
        FileExistsError: if `path` exists, is not empty and is not to be replaced.
        OSError: if writing fails, naming the folder; nothing is left of it, and what was at `path` stays.
    """
    path = Path(path)
    if path.exists() and not replace and not is_empty(path):
        raise FileExistsError(f"{path} exists and is not empty")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{PARTIAL}{path.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with explained_write(path):
            temporary.mkdir()
            yield temporary
            flush_folder(temporary)
            _exchange(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def explained_write(path: Path) -> Iterator[None]:
    """Whatever a library raises because a file could not be written becomes an OSError that says so."""
    try:
        yield
    except FileExistsError:
        raise
    except Exception as error:
        # safetensors and torch wrap the system's error in one of their own, torch without saying what it was.
        text, number = str(error), getattr(error, "errno", None)
        wrapped = type(error).__name__ == "SafetensorError" or "inline_container" in text or "PytorchStream" in text
        if number is None and not wrapped:
            raise
        full = number == errno.ENOSPC or "os error 28" in text or shutil.disk_usage(path.parent).free < 2**16
        reason = "the disk is full" if full else text
        number = errno.ENOSPC if full else number or errno.EIO
        raise OSError(number, f"{path} could not be written: {reason}. Nothing half-written is left of it") from error


def is_empty(path: str | Path) -> bool:
    """Whether a folder holds nothing; a file is not an empty folder."""
    return os.path.isdir(path) and not os.listdir(path)


def remove_partial(parent: Path) -> None:
    """Removes what a killed process left half-written in a folder that only one process writes."""
    for left in parent.glob(f"{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Puts every file of a folder on disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            flush_file(Path(root) / name)
        flush_file(Path(root))


def flush_file(path: Path) -> None:
    """Puts what was written to a file or folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(temporary: Path, path: Path) -> None:
    """Renames; an old folder steps aside first and is removed last, so that one of the two is always whole."""
    if is_empty(path):
        path.rmdir()
    old = None
    if path.exists():
        old = path.parent / f"{PARTIAL}{path.name}-{os.getpid()}-old"
        os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        if old is not None:
            os.rename(old, path)
        raise
    flush_file(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file in one step; a reader sees the old content or the new one, and a failure leaves the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, content: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: str | Path, content) -> None:
    """Indented JSON; NaN and infinity, which JSON has not, raise ValueError."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def fingerprint(files: Iterable[Path], *, pieces: int = 256, size: int = 2**14) -> str:
    """Of files: their sizes and pieces spread over them, which training or new text changes; of a small file all."""
    digest = hashlib.sha256()
    for file in files:
        total = file.stat().st_size
        digest.update(f"{file.name} {total} ".encode())
        places = [0] if total <= pieces * size else [index * (total - size) // (pieces - 1) for index in range(pieces)]
        with file.open("rb") as opened:
            for place in places:
                opened.seek(place)
                digest.update(opened.read(size if len(places) > 1 else -1))
    return digest.hexdigest()[:32]
