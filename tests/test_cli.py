"""The command line from outside: verbs, exit codes, what is printed where, interruption."""

import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpunlearn.checkpoint import Checkpoint, checkpoint_digest
from mpunlearn.cli import VERBS, main
from mpunlearn.progress import logger, say

RUN = "run model --forget forget.jsonl --retain retain.jsonl --copies 2 --epochs 1 --batch-size 3 --learning-rate 1e-4"


@pytest.fixture
def here(save_tiny, tmp_path: Path, examples, monkeypatch) -> Path:
    """A working directory with model, forget.jsonl and retain.jsonl."""
    save_tiny("model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mpunlearn(arguments: str, folder: Path, **options) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-m", "mpunlearn.cli", *arguments.split()], cwd=folder, **pipes)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Waits until a path exists, as long as the process runs."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_round_by_hand(here: Path, capsys) -> None:
    assert main("preprocess model --state state --out copies --copies 3 --kappa 0.02 --alphas 1,1.5,2".split()) == 0
    for copy in (1, 2, 3):
        arguments = f"unlearn copies/copy-{copy} --objective npo --forget forget.jsonl --retain retain.jsonl --epochs 1"
        arguments += f" --learning-rate 1e-4 --batch-size 4 --out updates/copy-{copy}"
        assert main(arguments.split()) == 0
    updates = " ".join(f"updates/copy-{copy}" for copy in (3, 1, 2))
    assert main(f"postprocess --state state {updates} --out new --eta 0.5".split()) == 0
    assert capsys.readouterr().out.split()[-1] == "new"
    assert checkpoint_digest("new") != checkpoint_digest("model")
    assert set(Checkpoint("new").tensors) == set(Checkpoint("model").tensors)


def test_a_run_and_a_configuration_file(here: Path) -> None:
    (here / "run.yaml").write_text(
        "forget: forget.jsonl\nretain: retain.jsonl\nrounds: 2\ncopies: 2\nepochs: 1\nalphas: 1,2\nlearning_rate: 1e-4\n"
    )
    assert main("run model --config run.yaml --out by-file --batch-size 3".split()) == 0
    assert main(f"{RUN} --rounds 2 --alphas 1,2 --out by-options".split()) == 0
    plans = [(here / name / "server" / "plan.json").read_text() for name in ("by-file", "by-options")]
    assert plans[0] == plans[1]
    assert (here / "by-file" / "final" / "config.json").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        "preprocess",
        "preprocess model --state s --out c --copies 0",
        "preprocess model --state s --out c --kappa -1",
        "preprocess model --state s --out c --kappa 1e6",
        "preprocess model --state s --out c --kappa x",
        "preprocess model --state s --out c --alphas 1,2",
        "preprocess model --state s --out c --alphas a,b",
        "preprocess nowhere --state s --out c",
        "preprocess forget.jsonl --state s --out c",
        "unlearn model --forget forget.jsonl --objective npo --out u",
        "unlearn model --forget nowhere --objective grad-ascent --out u",
        "unlearn model --forget forget.jsonl --objective grad-ascent --out u --optimizer adamm",
        "unlearn model --forget forget.jsonl --objective grad-ascent --out u --report-to wandb",
        "postprocess --state s model --out c",
        "run model --color red",
        "run model --forget forget.jsonl --rounds 0 --out r",
        "run model --forget forget.jsonl --objective npoo --out r",
        "run model --forget forget.jsonl --objective grad-ascent --eta -1 --out r",
        "run model --forget forget.jsonl --objective grad-ascent --seed -1 --out r",
        "run model --forget forget.jsonl --objective grad-ascent --learning-rate -1e-3 --out r",
        "run model --forget forget.jsonl --objective grad-ascent --optimizer adamm --out r",
        "run model --forget forget.jsonl --objective grad-ascent --optimizer adamw_bnb_8bit --out r",
        "run model --forget forget.jsonl --objective grad-ascent --report-to wandb --out r",
        "run org/model --forget forget.jsonl --objective grad-ascent --out r",
        "run model --forget forget.jsonl --objective grad-ascent --out .",
        "evaluate model --benchmark . --out forget.jsonl",
        "server start model --run r",
        "server start model --run r --insecure true",
        "server start model --run r --insecure --host 0.0.0.0",
        "server start model --run . --insecure",
        "server start model --run r --trust nowhere.json",
        "server start model --run r --insecure --clients 2 --weights 1",
        "server resume nowhere",
        "server status nowhere",
        "client join nowhere.json",
        "client join forget.jsonl",
        "client work --spool s --policy nowhere.toml --forget forget.jsonl",
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(here: Path, capsys, arguments: str) -> None:
    before = sorted(os.listdir())
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    verb = max((verb for verb in VERBS if arguments.startswith(verb)), key=len)
    assert error.startswith(f"mpunlearn {verb}: ")
    assert error.count("\n") == 1
    assert sorted(os.listdir()) == before


def test_a_used_port_is_an_error_and_starts_no_run(here: Path, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(f"server start model --run r --insecure --objective grad-ascent --port {port}".split()) == 2
    assert f"{port}" in capsys.readouterr().err
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run model --forget f --out o --learning-rat 1", "unknown option: --learning-rat. Did you mean --learning-rate?"),
        ("run model --forget f --out o --objective npoo", '"altpo"'),
        ("run model --forget f --out o --kappa", "--kappa is missing or has no value"),
        ("run model --forget f --out o --learning-rate -1e-3", "--learning-rate: expected a number of at least 0"),
        ("run model --forget f --out o --seed -1", "--seed: expected a number of at least 0, found -1"),
        ("run --forget f --out o", "CHECKPOINT is missing"),
        ("run model --forget f --out o --keep-exchange true", "flags take no value"),
        ("unlean model", "did you mean `mpunlearn unlearn`?"),
        ("server stat", "did you mean `mpunlearn server start`?"),
        ("evaluate org/model", "org/model: "),
    ],
)  # fmt: skip
def test_a_slip_is_named_in_one_line(arguments: str, message: str, capsys) -> None:
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_describe_and_what_preprocess_says(save_tiny, tmp_path: Path, monkeypatch, capsys) -> None:
    import torch

    save_tiny("model", dtype=torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    assert main(["describe", "model"]) == 0
    printed = capsys.readouterr().out
    assert "llama, 2 layers" in printed
    assert "permutation and signs" in printed
    assert "orthogonal" in printed
    assert main(["describe", "model", "--reparameterization", "half"]) == 2
    capsys.readouterr()
    assert main("preprocess model --state s --out c --kappa 0.00001".split()) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == ["c/copy-1", "c/copy-2", "c/copy-3"]
    assert "residual entropy" in captured.err
    assert "warning: rounding undoes the noise" in captured.err
    capsys.readouterr()
    assert main("preprocess model --state s2 --out c2 --kappa 0.00001 --quiet".split()) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == ["c2/copy-1", "c2/copy-2", "c2/copy-3"]
    assert captured.err.count("\n") == captured.err.count("warning: rounding undoes the noise") == 1


def test_a_disclosure_is_announced_before_the_copies_are_visible(here: Path, save_tiny, monkeypatch) -> None:
    import torch

    save_tiny("half", dtype=torch.bfloat16)
    visible = []

    class Watched(io.StringIO):
        def write(self, text: str) -> int:
            if "warning: rounding undoes the noise" in text:
                visible.append((here / "c").exists())
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Watched())
    assert main("preprocess half --state s --out c --kappa 0.00001".split()) == 0
    assert visible == [False]
    assert (here / "c").exists()


def test_every_verb_that_reports_prints_json(here: Path, capsys) -> None:
    def printed(arguments: str) -> dict:
        assert main([*arguments.split(), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert printed("describe model")["family"] == "llama"
    preprocessed = printed("preprocess model --state s --out c --copies 2")
    assert preprocessed["copies"] == ["c/copy-1", "c/copy-2"]
    assert printed(f"{RUN.replace('run model', 'unlearn c/copy-1').replace('--copies 2 ', '')} --out u")
    assert printed(f"{RUN} --out r --rounds 1") == {"result": "r/final"}
    (here / "benchmark").mkdir()
    for split in ("forget", "retain"):
        (here / "benchmark" / f"{split}.jsonl").write_bytes((here / f"{split}.jsonl").read_bytes())
    evaluated = printed("evaluate model --benchmark benchmark --max-new-tokens 2 --cache cache")
    assert 0 <= evaluated["metrics"]["forget_Q_A_Prob"] <= 1
    assert printed("client key --work keys")


def test_progress_lines_and_quiet(here: Path, capsys) -> None:
    """Away from a terminal there are plain lines with both losses; --quiet leaves only the result."""
    assert main(f"{RUN} --out loud --rounds 1 --print-config".split()) == 0
    capsys.readouterr()
    assert main(f"{RUN} --out loud --rounds 1".split()) == 0
    loud = capsys.readouterr()
    assert loud.out == "loud/final\n"
    assert "forget loss" in loud.err
    assert "retain loss" in loud.err
    assert "\r" not in loud.err
    assert "parameters on" not in loud.err
    assert main(f"{RUN} --out verbose --rounds 1 -v".split()) == 0
    assert re.search(r"copy-1: 0\.\d M parameters on (cpu|cuda:0) in torch.float32, loaded in", capsys.readouterr().err)
    assert main(f"{RUN} --out quiet --rounds 1 --quiet".split()) == 0
    quiet = capsys.readouterr()
    assert quiet.out == "quiet/final\n"
    assert "loss" not in quiet.err.replace("nothing was unlearned", "")


def test_output_is_set_up_for_the_command_alone(here: Path, capsys, caplog) -> None:
    before = (list(logger.handlers), logger.propagate, logger.level)
    assert main("describe model --quiet".split()) == 0
    assert (logger.handlers, logger.propagate, logger.level) == before
    with caplog.at_level(logging.INFO, logger="mpunlearn"):
        say("a line")
    assert "a line" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "ready", "hint"),
    [
        (f"{RUN} --out r --rounds 500", "r/server/state", "repeat the same command to resume"),
        ("server start model --run r --insecure --objective grad-ascent --port {port}", "r/invitation.json", "server resume r"),
        ("server status watched --watch", "", "interrupted"),
        ("client join {invitation} --work w --forget forget.jsonl", "w", "repeat the same command to resume"),
    ],
)  # fmt: skip
def test_ctrl_c_says_how_to_go_on_and_exits_130(here: Path, arguments: str, ready: str, hint: str) -> None:
    from mpunlearn.protocol.flower.programs import free_port

    (here / "invitation.json").write_text(
        json.dumps({"address": f"127.0.0.1:{free_port()}", "server_key": "0" * 64, "ca": None})
    )
    if "watched" in arguments:
        from mpunlearn.server.network.folder import RunFolder
        from mpunlearn.server.plan import RunPlan, Service

        RunPlan(checkpoint="model", service=Service("127.0.0.1", 9100, "127.0.0.1")).pin(
            RunFolder(here / "watched").plan
        )
    process = mpunlearn(arguments.format(port=free_port(), invitation="invitation.json"), here)
    wait_for(here / ready, process)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert hint in error.splitlines()[-1]


@pytest.mark.slow
def test_ctrl_c_before_anything_has_begun_shows_no_traceback(here: Path) -> None:
    """While the modules of the command are loaded, which takes most of the time until it begins."""
    code = """
import os, signal, sys
from mpunlearn.cli import main

class Interrupts:
    def find_spec(self, name, *_):
        if name == "mpunlearn.server.federation":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, *"server start model --run r --insecure".split()]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "mpunlearn server start: interrupted\n"


@pytest.mark.slow
def test_termination_is_an_orderly_end(here: Path) -> None:
    process = mpunlearn(f"{RUN} --out r --rounds 500", here)
    wait_for(here / "r" / "server" / "state", process)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert "Traceback" not in error
    assert not list((here / "r").rglob(".*.partial"))


def test_help_of_every_command(capsys) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    for verb in VERBS:
        assert verb in overview
        assert main([*verb.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert "usage: mpunlearn " + verb in text.replace("Usage:", "usage:")
        assert " at 0x" not in text
        assert not re.search(r"<\w+[ >]", text)
    for party in ("server", "client"):
        assert main([party, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"{party} {'start' if party == 'server' else 'join'}" in text
        assert "demo" not in text
    assert main(["forgive"]) == 2
    assert main(["--version"]) == 0


def test_no_help_loads_a_heavy_library() -> None:
    script = (
        "import sys; from mpunlearn.cli import VERBS, main; assert main(['--help']) == 0; "
        "assert not any(main([*verb.split(), '--help']) for verb in VERBS); "
        "heavy = {'torch', 'transformers', 'scipy', 'datasets', 'flwr', 'accelerate', 'peft', 'pyarrow', 'matplotlib', "
        "'safetensors', 'tokenizers', 'cryptography', 'httpx', 'fsspec', 'uvicorn', 'yaml', 'jinja2', 'tqdm'}; "
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_server_loads_no_training_library_and_nothing_of_the_client() -> None:
    script = (
        "import sys; from mpunlearn.server import preprocess, postprocess, rounds; "
        "heavy = {'transformers', 'accelerate', 'tokenizers', 'mpunlearn.client', 'mpunlearn.evaluation'}; "
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
