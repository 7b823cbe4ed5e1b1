"""The spool folder at the data owner, through which the courier exchanges messages with the worker.

    SPOOL/jobs/NAME       written by the courier, read by the worker
    SPOOL/results/NAME    written by the worker, read by the courier

NAME is the SHA-256 of the job. This code is part of the app that the server sends to the node. It needs access to this
folder only, so the data owner can run it in a container. It does not look into the messages; the parties validate them.
"""

import os
import re
import time
from contextlib import suppress
from pathlib import Path

NAME = re.compile(r"[0-9a-f]{64}")
MAX_MESSAGE_BYTES = 80_000_000
"""Maximum size of one Flower message, unless its first job or result is larger by itself."""


def exchange(
    spool: Path, deliver: dict[str, bytes], wanted: list[str], wait: float
) -> tuple[dict[str, bytes], list[str]]:
    """Writes jobs to the spool, waits a while for results, and reads those that are ready.

    Args:
        spool: the spool folder.
        deliver: new jobs by name.
        wanted: names of the jobs whose results are requested. All other jobs and results are obsolete and are removed.
        wait: maximum time to wait for all requested results, in seconds.

    Returns:
        Results by name, and the names of requested jobs that are not in the spool and must be delivered again.
    """
    jobs, results = spool / "jobs", spool / "results"
    names = [name for name in wanted if NAME.fullmatch(name)]
    for name, data in deliver.items():
        if NAME.fullmatch(name) and not (results / name).exists():
            put(jobs / name, data)
    for old in [*jobs.glob("*"), *results.glob("*")]:
        if NAME.fullmatch(old.name) and old.name not in names:
            old.unlink(missing_ok=True)
    end = time.monotonic() + wait
    while time.monotonic() < end and not all((results / name).exists() for name in names):
        time.sleep(0.1)
    ready: dict[str, bytes] = {}
    size = 0
    for name in names:
        if (results / name).exists() and (not ready or size + (results / name).stat().st_size <= MAX_MESSAGE_BYTES):
            ready[name] = (results / name).read_bytes()
            size += len(ready[name])
    return ready, [name for name in names if not (results / name).exists() and not (jobs / name).exists()]


def put(path: Path, data: bytes) -> None:
    """Writes a file atomically, into a folder that is opened without following a link.

    Like the folder, the file can be read by other users of the group only if the folder's owner has allowed it.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        partial, mode = f".{path.name}.partial", 0o600 | os.fstat(folder).st_mode & 0o060
        with suppress(FileNotFoundError):
            os.unlink(partial, dir_fd=folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(partial, flags, mode, dir_fd=folder), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, path.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)
