"""Does tasks on demand and measures them: the loop of both processes that `parity_time.py` compares."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def serve(task: Callable[[str], Callable[[], Any]], folder: Path, program: str) -> None:
    """Does the tasks whose names come in on standard input, and prints the seconds of each as a line of JSON.

    Args:
        task: prepares a task and returns what is to be timed. If that returns a state dict, it is saved.
        folder: where it is saved.
        program: the name of the program.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    for line in sys.stdin:
        name = line.strip()
        work = task(name)
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        if isinstance(result, dict) and any(isinstance(value, torch.Tensor) for value in result.values()):
            torch.save(result, folder / f"{program}-{name}.pt")
        print(json.dumps(seconds), file=answers, flush=True)
