"""Progress: plain lines where there is no terminal, and nothing that moves the cursor."""

import logging

import pytest

from mpunlearn import progress as module
from mpunlearn.progress import Progress, Waiting, logger, printable, say


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_short_task_says_nothing_and_a_long_one_now_and_then(clock: Clock, caplog) -> None:
    with caplog.at_level(logging.INFO, "mpunlearn"):
        with Progress(10, "short") as task:
            task.update(10)
        assert caplog.messages == []
        with Progress(10, "long") as task:
            for _ in range(10):
                clock.now += 4
                task.update()
    assert caplog.messages == ["long: 30%", "long: 60%", "long: 90%", "long: done in 40.0 s"]


def test_losses_are_said_even_if_it_was_short(clock: Clock, caplog) -> None:
    with caplog.at_level(logging.INFO, "mpunlearn"), Progress(2, "unlearning") as task:
        task.update(note="forget loss 1.0")
        task.update(note="forget loss 2.0")
    assert caplog.messages == ["unlearning: done in 0.0 s, forget loss 2.0"]


def test_a_task_that_fails_is_not_done(clock: Clock, caplog) -> None:
    with (
        caplog.at_level(logging.INFO, "mpunlearn"),
        pytest.raises(ValueError, match="x"),
        Progress(2, "failing") as task,
    ):
        task.update(note="loss 1")
        raise ValueError("x")
    assert caplog.messages == []


def test_other_processes_say_nothing(clock: Clock, caplog) -> None:
    with caplog.at_level(logging.INFO, "mpunlearn"), Progress(1, "second", shown=False) as task:
        clock.now += 100
        task.update(note="loss")
    assert caplog.messages == []


def test_waiting_explains_itself_once_and_then_counts(clock: Clock, caplog) -> None:
    with caplog.at_level(logging.INFO, "mpunlearn"):
        waiting = Waiting("waiting", quiet_seconds=5)
        for _ in range(80):
            waiting.tick(lambda: "nobody is there")
            clock.now += 1
        waiting.finish()
        clock.now += 100
        waiting.tick(lambda: "again")
    assert caplog.messages == ["nobody is there", "waiting: 35 s", "waiting: 65 s"]


def test_bars_are_for_terminals_and_not_for_those_who_asked_for_quiet(monkeypatch) -> None:
    class Terminal:
        def __init__(self) -> None:
            self.text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

        def flush(self) -> None:
            pass

    for level, shown in ((logging.NOTSET, True), (logging.INFO, True), (logging.ERROR, False)):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setattr(logger, "level", level)
        logger.manager._clear_cache()
        with Progress(1, "label") as task:
            task.update()
        assert ("label" in terminal.text) is shown, level
    logger.manager._clear_cache()


def test_what_is_said_cannot_move_the_cursor(caplog) -> None:
    with caplog.at_level(logging.INFO, "mpunlearn"):
        say("a\x1b[2Jb\ud800\nc ä")
    assert caplog.messages == [printable("a\x1b[2Jb\ud800\nc ä")] == ["a\\x1b[2Jb\\ud800\\nc ä"]
