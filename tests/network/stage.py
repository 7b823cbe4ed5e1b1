"""Our programs and Flower's as processes of their own, with their logs in a folder."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from mpunlearn.protocol.flower.programs import kill_orphans

TRAINING = "--objective simnpo --epochs 8 --batch-size 4 --learning-rate 1e-3 --rounds 3 --copies 2 --kappa 0.02"
TIMEOUT_SECONDS = 150.0


class Stage:
    """Programs with their logs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", "mpunlearn.cli", *arguments]
            self.running[name] = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait(self, name: str, text: str, times: int = 1, seconds: float = TIMEOUT_SECONDS) -> None:
        end = time.monotonic() + seconds
        while self.log(name).count(text) < times:
            if time.monotonic() > end:
                logs = {file.name: file.read_text()[-1500:] for file in self.folder.rglob("*.log")}
                raise AssertionError(f"{name} never said {text!r} {times} times: {json.dumps(logs, indent=1)}")
            time.sleep(0.1)

    def kill(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGKILL)
        self.running[name].wait()

    def stop(self) -> None:
        for program in self.running.values():
            program.kill()
            program.wait()
        for home in self.folder.rglob("flower"):
            kill_orphans(home)


def kill_flower(home: Path, program: str) -> None:
    """kill -9 to Flower's programs of that name in one installation, as soon as there are any."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while not (found := _flower(home, program)):
        assert time.monotonic() < end, f"no {program} runs"
        time.sleep(0.1)
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(found, 10)


def _flower(home: Path, program: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == str(home) and any(
                program in Path(part).name for part in process.cmdline()[:6]
            ):
                found.append(process)
    return found
