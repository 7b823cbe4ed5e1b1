"""The passes on a Ray cluster on this machine. Skipped where ray is not installed; `make ray-test` installs it."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mpunlearn.cli import main

SCRIPT = """
import json, sys, threading, time
from pathlib import Path
import psutil, ray, torch
torch.set_num_threads(1)
from mpunlearn.checkpoint import Checkpoint
from mpunlearn.errors import StateError
from mpunlearn.server.postprocess import postprocess
from mpunlearn.server.preprocess import preprocess
from tests.server.test_shards import SMALL, PERTURBATION, contents, same_state, synthetic

path, folder = Path(sys.argv[1]), Path(sys.argv[2])
options = {"perturbation": PERTURBATION, "max_shard_size": SMALL}
whole = preprocess(path, state=same_state(folder / "a"), out=folder / "whole", **options)
updates = [synthetic(copy, folder / f"u-{copy.name}") for copy in whole.copies]
expected = [contents(copy) for copy in whole.copies]
final = contents(postprocess(updates, state=folder / "a", out=folder / "final", max_shard_size=SMALL))
killed, same = [], []


def kill_one():
    while not killed:
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline() and process.cmdline()[0].startswith("ray::_call"):
                    process.kill()
                    killed.append(process.pid)
                    return
            except psutil.Error:
                pass
        time.sleep(0.005)


for workers in (1, 2, 3):
    ray.init(num_cpus=workers, log_to_driver=False, include_dashboard=False, configure_logging=False)
    state = same_state(folder / f"s{workers}")
    if workers == 2:
        threading.Thread(target=kill_one, daemon=True).start()
    done = preprocess(path, state=state, out=folder / f"c{workers}", engine="ray", **options)
    same.append([contents(copy) for copy in done.copies] == expected)
    if workers == 3:
        out = postprocess(updates, state=state, out=folder / "f", engine="ray", max_shard_size=SMALL)
        same.append(contents(out) == final)
        (file,) = path.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-4] + b"0000")
        try:  # what goes wrong in a task is said as it would be here
            postprocess(updates, state=folder / "s1", out=folder / "g", engine="ray", max_shard_size=SMALL)
        except StateError as error:
            same.append("has changed since round 1" in str(error) and not (folder / "g").exists())
    ray.shutdown()
print(json.dumps({"same": same, "killed": len(killed)}))
"""


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes_even_if_one_is_killed(save_tiny, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    path = save_tiny(dtype=torch.bfloat16)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"same": [True] * 5, "killed": 1}


@pytest.mark.skipif(find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_the_message_names_the_extra(tmp_path: Path, capsys) -> None:
    arguments = ["preprocess", "m", "--state", str(tmp_path / "s"), "--out", str(tmp_path / "c"), "--engine", "ray"]
    assert main(arguments) == 2
    assert "pip install 'mpunlearn[ray]'" in capsys.readouterr().err
