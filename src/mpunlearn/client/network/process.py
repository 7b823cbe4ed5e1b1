"""A process of its own for everything that touches a copy, with limits of memory and time.

A copy, its tokenizer and its chat template come from the server, and transformers, tokenizers and Jinja were not written
for hostile input: a template can run forever, a tokenizer can abort the program, a number can ask for all memory. The
client's program therefore only forks a process, tells it what to do, and waits. If that process fails, the job is refused
and the next one gets a new process.

The process is forked, not started anew: that takes no time, and the parent does none of the things that do not survive
a fork, since it loads no model. It lives for several jobs, so that texts are tokenized once, and it ends when the parent
does, however that ends.

Not covered: what a process could do that such input takes over. It runs as the same user, who should have no rights that
the forget set is not worth.
"""

import errno
import json
import multiprocessing
import os
import resource
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from mpunlearn.errors import (
    DisclosureWarning,
    MPUError,
    NothingUnlearnedWarning,
    PlanError,
    RefusalError,
    StateError,
)
from mpunlearn.schema import explained

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors that no job causes and only the user can fix."""
WARNINGS = {kind.__name__: kind for kind in (DisclosureWarning, NothingUnlearnedWarning)}
"""Warnings of the process that the parent issues again under their own category."""
POLL_SECONDS = 1.0
"""How often the parent looks whether the process still lives."""


@dataclass(frozen=True)
class ProcessLimits:
    """The table [process] of policy.toml.

    Raises:
        PlanError: a limit is not above 0.
    """

    memory_gigabytes: float | None = explained(
        None, "Memory of the process that loads copies and trains on them (default: nine tenths of this machine's)."
    )
    examine_minutes: float = explained(
        60.0, "How long it may load, tokenize and examine a copy. A chat template can run forever."
    )
    train_hours: float = explained(24.0, "How long it may train on a copy and audit the update.")

    def __post_init__(self) -> None:
        for name in ("memory_gigabytes", "examine_minutes", "train_hours"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise PlanError(f"policy: process: {name}: expected a number above 0, found {value}")

    @property
    def memory_bytes(self) -> int:
        """The limit of memory."""
        if self.memory_gigabytes is not None:
            return int(self.memory_gigabytes * 1e9)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 9 // 10


class Process:
    """Calls the methods of an object in a process of its own.

    Args:
        service: makes the object, in the process. It gets a function that reports one line to the user.
        limits: memory of the process.
        say: reports one line to the user.
    """

    def __init__(
        self, service: Callable[[Callable[[str], None]], Any], limits: ProcessLimits, say: Callable[[str], None]
    ) -> None:
        self._service, self._limits, self._say = service, limits, say
        self._child: multiprocessing.process.BaseProcess | None = None

    def call(self, method: str, seconds: float, *arguments: str) -> Any:
        """Calls a method of the object, and returns what it returned, which must be JSON.

        Args:
            method: its name.
            seconds: how long it may take.
            arguments: its arguments.

        Raises:
            RefusalError: the method raised one, or the process ended or took too long.
            StateError: the disk is full or cannot be written.
        """
        if self._child is None or not self._child.is_alive():
            self._start()
        try:
            kind, value = self._answer((method, *arguments), seconds)
        except BaseException:
            self.stop()
            raise
        if kind == "done":
            return value
        if kind == "refused":
            raise RefusalError(value)
        self.stop()  # after an error, nobody knows what state the process is in
        raise StateError(value) if kind == "full" else RefusalError(value)

    def _answer(self, call: tuple[str, ...], seconds: float) -> tuple[str, Any]:
        """Sends a call, and waits for its answer."""
        assert self._child is not None
        end = time.monotonic() + seconds
        try:
            self._connection.send_bytes(json.dumps(call).encode())
            while time.monotonic() < end:
                if self._connection.poll(min(POLL_SECONDS, max(0.0, end - time.monotonic()))):
                    kind, value = json.loads(self._connection.recv_bytes())
                    if kind == "say":
                        self._say(value)
                    elif kind == "warn":
                        warnings.warn(value[1], WARNINGS.get(value[0], UserWarning), stacklevel=4)
                    else:
                        return kind, value
            self._say(f"handling the copy took more than {seconds:g} s, the policy's limit, and was stopped")
            raise RefusalError("handling the copy takes more time than the client's policy allows")
        except (EOFError, OSError):
            self._child.join(POLL_SECONDS)
            code = self._child.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._say(
                f"the process that handled the copy ended ({how}): the copy is broken, or it needs too much memory"
            )
            raise RefusalError("handling the copy ended the process that did it") from None

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._connection.close()
            os.close(self._alive)
            self._child = None

    def _start(self) -> None:
        self.stop()
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        watched, self._alive = os.pipe()
        self._child = context.Process(target=self._serve, args=(theirs, watched), daemon=True)
        self._child.start()
        theirs.close()
        os.close(watched)

    def _serve(self, connection: Connection, watched: int) -> None:
        """What the process does: answers calls until the parent ends."""
        os.close(self._alive)
        self._connection.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()
        _limit(self._limits.memory_bytes)

        def send(kind: str, value: Any) -> None:
            connection.send_bytes(json.dumps([kind, value]).encode())

        def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
            send("warn", [category.__name__, str(message)])

        warnings.showwarning = show  # type: ignore[assignment]
        service = self._service(lambda line: send("say", line))
        while True:
            try:
                method, *arguments = json.loads(connection.recv_bytes())
            except EOFError:
                return
            try:
                send("done", getattr(service, method)(*arguments))
            except RefusalError as error:
                send("refused", str(error))
            except Exception as error:
                if isinstance(error, MPUError):
                    send("say", str(error))
                else:
                    traceback.print_exc()
                send(*_outcome(error))


def _limit(memory: int) -> None:
    """Limits the memory of this process, and makes it the first one to go if the machine's memory ends."""
    with suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        memory = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")


def _end_with_parent(watched: int) -> None:
    """Ends this process when the other end of a pipe closes, which only the parent holds."""
    os.read(watched, 1)
    os._exit(1)


def _outcome(error: Exception) -> tuple[str, str]:
    """What the parent does about an exception: "full" if the disk is, which only the user can help, else "broken"."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in FULL_DISK:
            return "full", f"{error}; free some space and run again"
        cause = cause.__cause__
    return "broken", "handling the copy failed"
