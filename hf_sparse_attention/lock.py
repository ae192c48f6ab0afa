"""A folder -> nobody else's while a run writes into it. A leaf."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

# In the folder while it is written to; what a killed process leaves of it holds no lock.
LOCK = ".lock"


@contextmanager
def sole_writer(folder: str | Path) -> Iterator[None]:
    """No second block of this kind is inside a folder, from any process of the file system that `folder` is on.

    The folder is made, and goes again if the block leaves it empty. The system lets go of the lock when its process
    ends, however it ends. Where no lock can be had, a warning says why and the block runs.

    Raises:
        FileExistsError: if another run, of this process or another, is inside.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output {folder} is a file, not a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path)
    # Earlier versions of filelock empty the file of whoever holds it when they ask.
    holder = _holder(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise FileExistsError(
            f"another run is writing into output {folder}{holder}: wait until it ends, or name another output"
        ) from None
    except (NotImplementedError, OSError) as error:
        # A file system without locks; or one that is full or may only be read, which a finished run does not mind.
        logger.warning("%s cannot be locked (%s): nothing keeps another run from writing there", folder, error)
    try:
        if lock.is_locked:
            # Only said to whom it keeps out: a full disk is met by the run itself.
            with suppress(OSError):
                path.write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        if lock.is_locked:
            # Before the lock goes, or it could be the file of the next run.
            with suppress(OSError):
                path.unlink()
            lock.release()
        for empty in made:
            try:
                empty.rmdir()
            except OSError:
                break


def _holder(path: Path) -> str:
    try:
        process, host = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return ""
    return f" (process {process} on {host})"
