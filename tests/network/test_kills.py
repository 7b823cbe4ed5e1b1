"""Random kills, for as long as one likes: `MPUNLEARN_KILLS=30 pytest tests/network/test_kills.py`, about half a minute each.

`test_flower` kills each program once. This one kills any of the programs of a run, ours and Flower's, on either side, at
random times, and expects the result of the undisturbed run.
"""

import os
import random
import shutil
import time
from pathlib import Path

import pytest
from tests.network.federation import tiny_world
from tests.network.stage import TRAINING, Stage, kill_flower
from tests.network.test_flower import undisturbed

from mpunlearn.checkpoint import checkpoint_digest
from mpunlearn.protocol.flower.keys import client_keys, read_invitation
from mpunlearn.protocol.flower.programs import free_port

pytest.importorskip("flwr")
KILLS = int(os.environ.get("MPUNLEARN_KILLS", "0"))
SERVER = ("flower-superlink", "flower-superexec", "flwr-serverapp", "mpunlearn.server.network.gateway")
CLIENT = ("flower-supernode", "flower-superexec", "flwr-clientapp")


@pytest.mark.slow
@pytest.mark.skipif(not KILLS, reason="set MPUNLEARN_KILLS to a number of kills")
def test_no_kill_at_any_time_changes_the_result(stage: Stage, tmp_path: Path) -> None:
    files, seed = tiny_world(tmp_path), int(time.time())
    print(f"seed {seed}")
    choice = random.Random(seed)
    for name in ("a", "b"):
        client_keys(tmp_path / name)
    training = TRAINING.replace("--rounds 3", f"--rounds {3 + KILLS // 3}")
    options = [
        *training.split(),
        "--clients",
        "2",
        "--trust",
        "a/client.json,b/client.json",
        "--port",
        str(free_port()),
    ]
    stage.start("server", "server", "start", "model", "--run", "run", *options)
    stage.wait("server", "round 1: 2 copies published")
    stage.kill("server")
    shutil.copytree(tmp_path / "run", tmp_path / "reference" / "run")
    for name in ("a", "b"):
        shutil.copytree(tmp_path / name, tmp_path / "reference" / name)
    expected = undisturbed(tmp_path / "reference" / "run", tmp_path / "reference", files)

    commands = {"server": ["server", "resume", "run"]}
    for name in ("a", "b"):
        places = ["--work", name, "--spool", f"spool-{name}"]
        data = ["--policy", "policy.toml", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
        commands[f"join-{name}"] = ["client", "join", "run/invitation.json", *places]
        commands[f"work-{name}"] = ["client", "work", *places, *data]
    stage.start("server", *commands["server"])
    stage.wait("server", "clients join with", 2)
    key = read_invitation(tmp_path / "run" / "invitation.json").server_key
    (tmp_path / "policy.toml").write_text(f'server_key = "{key}"\nmax_rounds = 100\n')
    for name in set(commands) - {"server"}:
        stage.start(name, *commands[name])
    flower = [(tmp_path / "run" / "flower", program) for program in SERVER]
    flower += [(tmp_path / name / "flower", program) for name in ("a", "b") for program in CLIENT]
    victims: list[str | tuple[Path, str]] = [*commands, *flower]
    killed: list[str] = []
    while len(killed) < KILLS and stage.running["server"].poll() is None:
        time.sleep(choice.uniform(0, 30))
        victim = choice.choice(victims)
        if isinstance(victim, str):
            if stage.running[victim].poll() is None:
                stage.kill(victim)
                stage.start(victim, *commands[victim])
                killed.append(victim)
            continue
        try:
            kill_flower(*victim)
        except AssertionError:
            continue  # it does not run at this moment
        killed.append(victim[1])
    stage.wait("server", f"round {3 + KILLS // 3} of {3 + KILLS // 3} is complete", seconds=900)
    for name in ("server", "work-a", "work-b"):
        assert stage.running[name].wait(120) == 0, stage.log(name)
    assert len(killed) >= KILLS, killed
    assert checkpoint_digest(tmp_path / "run" / "final") == expected, killed
    print(killed)
