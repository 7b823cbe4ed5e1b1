"""The client program survives any signed job: whatever is in a copy or a plan, it is a refusal, and the next job is done."""

import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.network.federation import Net
from tests.network.forgery import TRAINING, Scene, answer, given, hand_over, job_with

from mpunlearn.client.client import Client
from mpunlearn.client.network.bounds import PlanBounds
from mpunlearn.client.network.process import Process, ProcessLimits
from mpunlearn.errors import DisclosureWarning, FileError, RefusalError, StateError

FREE = PlanBounds(
    max_learning_rate=1e99, min_batch_size=1, min_steps=1, min_max_length=1, max_skip_tokens=10**6, max_grad_norm=1e99,
    factor=1e99, max_adam_epsilon=1e99,
)  # fmt: skip
"""Without bounds, so that a plan gets as far as it can."""


def config(**changes: Any) -> Callable[[Path], None]:
    def change(copy: Path) -> None:
        file = copy / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def tokenizer_config(**changes: Any) -> Callable[[Path], None]:
    def change(copy: Path) -> None:
        file = copy / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def tokenizer(**changes: Any) -> Callable[[Path], None]:
    def change(copy: Path) -> None:
        file = copy / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def template(text: str) -> Callable[[Path], None]:
    return lambda copy: (copy / "chat_template.jinja").write_text(text) and None


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def changed(copy: Path) -> None:
        found = load_file(copy / "model.safetensors")
        change(found)
        save_file(found, copy / "model.safetensors", {"format": "pt"})

    return changed


def nan(found: dict[str, torch.Tensor]) -> None:
    found["model.norm.weight"][3] = torch.nan


ENDLESS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
BOMB = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": ""}, "content": "x" * 4000}] * 6}
COPIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "rope_parameters is a string": (config(rope_parameters="x"), "cannot load the copy"),
    "rope_parameters is a list": (config(rope_parameters=[1]), "the copy"),
    "a billion layers": (config(num_hidden_layers=10**9), "more than the"),
    "more layers than an integer holds": (config(num_hidden_layers=10**30), "more than the"),
    "a billion tokens": (config(vocab_size=10**9), "has shape"),
    "a billion neurons": (config(intermediate_size=10**9), "has shape"),
    "a billion experts": (config(model_type="mixtral", num_local_experts=10**9), "more than the"),
    "mlp_only_layers is a number": (
        config(model_type="qwen3_moe", num_experts=1, mlp_only_layers=3),
        "mlp_only_layers",
    ),
    "mlp_only_layers has objects": (config(model_type="qwen3_moe", mlp_only_layers=[{}]), "the copy"),
    "an activation that does not exist": (config(hidden_act="os.system"), "cannot load the copy"),
    "a padding token out of reach": (config(pad_token_id=10**9), "the copy"),
    "weights that are not numbers": (weights(nan), "not plausible: finite"),
    "weights without end": (weights(lambda found: found["model.norm.weight"].mul_(1e38)), "not plausible"),
    "an endless template": (template(ENDLESS), "more time than the client's policy allows"),
    "a template that asks for all memory": (template("{{ 'a' * 10**10 }}"), "memory"),
    "a template that is none": (template("{% for"), "the copy"),
    "a template that refuses every chat": (template("{{ raise_exception('no') }}"), "the copy"),
    "a template that pads": (template("{{ messages[0]['content'].ljust(50000) ~ 'x' }}"), "the copy"),
    "a tokenizer that replaces nothing by much": (tokenizer(normalizer=BOMB), "the copy"),
    "a tokenizer that is none": (tokenizer(model={"type": "BPE"}), "cannot load the copy"),
    "a tokenizer without end": (tokenizer_config(eos_token={"a": {}}), "the copy"),
    "a deep tokenizer": (lambda copy: (copy / "tokenizer_config.json").write_text("[" * 10**5) and None, "the copy"),
    "a deep config": (lambda copy: (copy / "config.json").write_text('{"a":' * 10**5) and None, "the copy"),
    "a config that is a list": (lambda copy: (copy / "config.json").write_text("[]") and None, "the copy"),
}


def strict(scene: Scene, folder: Path, **policy: Any) -> Net:
    """The run, with a worker that has little memory and time, and no bounds of the plan."""
    net = scene.net(folder)
    process = ProcessLimits(memory_gigabytes=4.0, examine_minutes=12 / 60)
    net.policy = {"process": process, "plan": FREE, **policy}
    net.workers[0].close()
    net.workers = [net.start_worker(0)]
    return net


def goes_on(net: Net) -> bool:
    """Whether the same worker does an honest job now."""
    for ledger in (net.folder / "work-0").glob("*.json"):
        ledger.unlink()  # the honest copy has the same number, which is another test's matter
    return answer(net, hand_over(net, job_with(net, nonce="honest"))).refusal is None


SLOW = ("an endless template", "a tokenizer that replaces nothing by much")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in COPIES]
)
def test_a_copy_is_refused_and_the_client_goes_on(case: str, scene: Scene, tmp_path: Path) -> None:
    change, why = COPIES[case]
    net = strict(scene, tmp_path / "net")
    folder = net.folder / "server/exchange/round-1/copies/copy-1"
    honest = {file.name: file.read_bytes() for file in folder.iterdir()}
    change(folder)
    refusal = answer(net, given(net, folder)).refusal
    assert refusal is not None, net.said
    assert why in refusal, net.said
    assert str(tmp_path) not in refusal
    assert not (net.folder / "work-0" / "updates" / "round-1-copy-1").exists()
    for name, data in honest.items():
        (folder / name).write_bytes(data)
    assert goes_on(net), net.said


PLANS: dict[str, dict[str, Any]] = {
    "a learning rate without end": {"learning_rate": 1e30},
    "a length of one": {"max_length": 1},
    "beta without end": {"parameters": {"beta": 1e300}},
    "warmup without end": {"warmup_steps": 1 << 53},
    "weight decay without end": {"weight_decay": 1e300},
    "a scheduler that does not exist": {"scheduler": "x"},
    "a scheduler that needs more": {"scheduler": "warmup_stable_decay"},
    "a rank above all widths": {"lora_rank": 1 << 52},
    "nothing to train": {"train": "x"},
    "a pattern that is none": {"train": "("},
    "a layer that does not exist": {"objective": "rmu", "parameters": {"layer": 99}},
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_is_refused_or_followed_and_the_client_goes_on(case: str, scene: Scene, tmp_path: Path) -> None:
    train = {"train": ["blocks", PLANS[case].get("train", "blocks")]}
    net = strict(scene, tmp_path / "net", **train)
    plan = {**TRAINING, **PLANS[case]}
    found = answer(net, hand_over(net, job_with(net, training=plan)))
    assert found.refusal is not None or found.files
    assert goes_on(net), net.said


def test_a_first_job_of_a_later_round_does_not_end_the_client(scene: Scene, tmp_path: Path) -> None:
    """NPO compares with the copy of round 1, which this client has never seen."""
    net = strict(scene, tmp_path / "net")
    late = job_with(net, round=2, rounds=3, training={**TRAINING, "objective": "npo"})
    assert answer(net, hand_over(net, late)).refusal is not None
    assert goes_on(net)


def test_a_killed_training_is_a_refusal_with_its_reason(scene: Scene, tmp_path: Path, monkeypatch) -> None:
    """What the machine's memory guard does: SIGKILL in the middle."""
    net = strict(scene, tmp_path / "net")
    with monkeypatch.context() as patch:
        patch.setattr(Client, "unlearn", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        path = hand_over(net, job_with(net))
    assert answer(net, path).refusal == "handling the copy ended the process that did it"
    assert any("ended (SIGKILL)" in line for line in net.said)
    assert goes_on(net)


def test_the_process_ends_with_the_worker(scene: Scene, tmp_path: Path) -> None:
    net = strict(scene, tmp_path / "net")
    assert answer(net, hand_over(net, job_with(net))).refusal is None
    child = net.workers[0]._process._child
    assert child is not None
    assert child.is_alive()
    net.workers[0].close()
    assert not child.is_alive()


@pytest.mark.parametrize("entry", ["gguf_file", "tokenizer_file", "vocab_file", "added_tokens_file", "merges_file"])
def test_no_entry_of_the_tokenizer_opens_a_file_elsewhere(
    entry: str, scene: Scene, tmp_path: Path, monkeypatch
) -> None:
    """transformers opens what some entries name, wherever that is."""
    from mpunlearn.lm.model import load_tokenizer

    net = scene.net(tmp_path / "net")
    folder = net.folder / "server/exchange/round-1/copies/copy-1"
    elsewhere, opened = tmp_path / "private", []
    elsewhere.write_text("x")
    isfile = os.path.isfile
    for kind in ("LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer"):
        tokenizer_config(**{entry: str(elsewhere), "tokenizer_class": kind})(folder)
        (folder / "special_tokens_map.json").write_text(json.dumps({entry: str(elsewhere)}))
        with monkeypatch.context() as patch:
            patch.setattr(os.path, "isfile", lambda path: opened.append(str(path)) or isfile(path))
            load_tokenizer(folder)
    assert str(elsewhere) not in opened


class Service:
    """What a process can do to its parent."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._calls = say, 0

    def count(self, *arguments: str) -> list[Any]:
        self._calls += 1
        return [self._calls, *arguments]

    def fail(self) -> None:
        raise ZeroDivisionError

    def fill(self) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise FileError("x: cannot be written") from error

    def leave(self) -> None:
        os._exit(3)

    def talk(self) -> None:
        while True:
            self._say("still here")

    def warn(self) -> None:
        warnings.simplefilter("always")
        warnings.warn("names tokens", DisclosureWarning, stacklevel=1)

    def grow(self) -> None:
        bytearray(3 * 10**10)


def test_a_process_answers_and_whatever_it_does_the_next_call_gets_a_good_one() -> None:
    said: list[str] = []
    process = Process(Service, ProcessLimits(memory_gigabytes=8.0), said.append)
    assert process.call("count", 60, "a", "b") == [1, "a", "b"]
    assert process.call("count", 60) == [2]  # the same process
    with pytest.warns(DisclosureWarning, match="names tokens"):
        process.call("warn", 60)
    assert process.call("count", 60) == [3]
    for method, seconds, reason in (
        ("fail", 60, "handling the copy failed"),
        ("grow", 60, "handling the copy failed"),
        ("leave", 60, "ended the process"),
        ("talk", 0.5, "more time than"),
    ):
        with pytest.raises(RefusalError, match=reason):
            process.call(method, seconds)
        assert process.call("count", 60) == [1], method
    with pytest.raises(StateError, match="free some space and run again"):
        process.call("fill", 60)
    assert "the process that handled the copy ended (exit code 3)" in " ".join(said)
    process.stop()


def test_a_process_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    """It may be in the middle of a training when that happens."""
    script = (
        "import os, sys, time\n"
        "from mpunlearn.client.network.process import Process, ProcessLimits\n"
        "class Service:\n"
        "    def __init__(self, say): say(str(os.getpid()))\n"
        "    def sleep(self): time.sleep(600)\n"
        "Process(Service, ProcessLimits(), lambda line: print(line, flush=True)).call('sleep', 600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
