"""Progress reports: bars on a terminal and in a notebook, log lines elsewhere, nothing with `--quiet`.

Bars go to standard error, or to the cell of the notebook. Lines go to the logger `mpunlearn`; the command line prints
them to standard error, and a program that uses the library sees them once it configures logging. A task that takes less
than `LINE_SECONDS` logs nothing, unless it reports values such as losses; with `--verbose`, it logs how long it took.
"""

import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from tqdm.auto import tqdm

LINE_SECONDS = 10.0
"""Minimum number of seconds between two log lines of a task."""

logger = logging.getLogger("mpunlearn")
T = TypeVar("T")


def progress(items: Collection[T], what: str) -> Iterator[T]:
    """Iterates over `items` and shows the progress."""
    with Progress(len(items), what) as task:
        for item in items:
            yield item
            task.update()


class Progress:
    """The progress of a task with a known number of steps. Use as a context manager.

    Args:
        total: number of steps.
        what: label of the task.
        shown: whether this process shows progress; in distributed training, only one does.
    """

    def __init__(self, total: int, what: str, shown: bool = True) -> None:
        from tqdm.auto import tqdm  # here, since it takes longer than everything else that a help text needs

        self._total, self._what, self._done, self._note = total, what, 0, ""
        self._begun = self._last = time.monotonic()
        bar = shown and _bars()
        self._bar = tqdm(total=total, desc=what, unit_scale=True, leave=False, dynamic_ncols=True, disable=not bar)
        self._shown, self._lines = shown, shown and not bar
        self._logged = False

    def update(self, steps: int = 1, note: str = "") -> None:
        """Advances by some steps; `note` is shown next to the count, such as the current losses."""
        self._done += steps
        self._note = note or self._note
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(steps)
        if self._lines and time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            self._log(f"{self._done / max(1, self._total):.0%}")

    def _log(self, state: str) -> None:
        self._logged = True
        logger.info("%s: %s%s", self._what, state, f", {self._note}" if self._note else "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        seconds = time.monotonic() - self._begun
        if self._lines and kind is None and (self._logged or self._note):
            self._log(f"done in {seconds:.1f} s")
        elif self._shown and kind is None:
            logger.debug("%s: done in %.1f s", self._what, seconds)


class Waiting:
    """Reports a wait of unknown length: nothing at first, then a line that explains it, then the seconds elapsed.

    Args:
        what: label of what is waited for.
        quiet_seconds: how long to wait before the first report.
    """

    def __init__(self, what: str, quiet_seconds: float) -> None:
        self._what, self._quiet = what, quiet_seconds
        self._begun = self._last = time.monotonic()
        self._bar: tqdm[None] | None = None
        self._told = False
        self.over = False
        """Whether the wait is over."""

    def tick(self, explain: Callable[[], str]) -> None:
        """Reports if it is time to; call this often. `explain` returns the line that explains the wait."""
        now = time.monotonic()
        if self.over or now - self._begun < self._quiet:
            return
        if not self._told:
            self._told, self._last = True, now
            say(explain())
            if _bars():
                from tqdm.auto import tqdm

                self._bar = tqdm(desc=self._what, unit="s", leave=False, bar_format="{desc}: {n:.0f} s", mininterval=0)
        elif self._bar is not None:
            self._bar.n = now - self._begun
            self._bar.refresh()
        elif now - self._last >= 3 * LINE_SECONDS:
            self._last = now
            logger.info("%s: %.0f s", self._what, now - self._begun)

    def finish(self) -> None:
        """Ends the wait."""
        self.over = True
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()


def _bars() -> bool:
    """Whether to show bars: standard error is a terminal or a notebook, and progress was not silenced."""
    return (sys.stderr.isatty() or _notebook()) and logger.isEnabledFor(logging.WARNING)


def _notebook() -> bool:
    """Whether the code runs in a notebook, where `tqdm.auto` draws its bars into the cell."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def say(line: str) -> None:
    """Logs one line, with unprintable characters escaped, since parts of it may come from the other party."""
    logger.info("%s", printable(line))


def printable(text: str) -> str:
    """Escapes the unprintable characters of a text."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
