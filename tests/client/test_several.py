"""Training on several processes: the update of one process, in one directory, and resumed after one of them was killed."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from tests.client.several import FAILED, run_together
from tests.client.training import distance, read_all

from mpunlearn.checkpoint import Checkpoint, TensorDirectory
from mpunlearn.cli import main
from mpunlearn.client.batches import MicroBatches

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::mpunlearn.DisclosureWarning"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),  # float16 skips steps
]

SMOOTH = ["--adam-epsilon", 1e-4]
"""With its default epsilon, AdamW magnifies rounding errors in tiny gradients."""
CASES: dict[str, list] = {
    "tensor_adam": ["--objective", "npo", "--optimizer", "tensor_adam"],
    "reference": ["--objective", "grad-diff", "--retain-loss", "kl", "--cpu-offload"],
    "ngdiff": ["--objective", "ngdiff"],
    "pdu": ["--objective", "pdu", "--dual-warmup", "1"],
    "dpo": ["--objective", "dpo"],
    "sam": ["--objective", "npo", "--optimizer", "tensor_adam", "--sam-radius", "0.1"],
    "lora": ["--objective", "npo", "--lora-rank", "3", "--gradient-checkpointing"],
    "lora-reference": ["--objective", "undial", "--lora-rank", "2", *SMOOTH],
    "everything": ["--objective", "npo", "--train", "all", "--gradient-checkpointing"],
    "experts": ["--objective", "npo", "--train", "experts"],
    "bfloat16": ["--objective", "npo", "--precision", "bfloat16", "--optimizer", "sgd", "--learning-rate", "0.1"],
    "float16": ["--objective", "grad-diff", "--precision", "float16", "--optimizer", "sgd", "--learning-rate", "0.1"],
}
TOLERANCE = {"bfloat16": 0.06, "float16": 0.02}


def line(model: Path, examples, out: Path, *options) -> list:
    """The command line of a training."""
    common = ["--forget", examples[0], "--retain", examples[1], "--batch-size", 4, "--epochs", 2, "--max-length", 64]
    if "--learning-rate" not in options:
        common += ["--learning-rate", 1e-3]
    return ["unlearn", model, "--out", out, *common, "--micro-batch-size", 1, *options]


def alone(arguments: list) -> int:
    return main([str(part) for part in arguments if part != "--cpu-offload"])


@pytest.fixture
def models(save_tiny) -> dict[str, Path]:
    """A model for each case."""
    plain, tied = save_tiny(), save_tiny("tied", tie_word_embeddings=True)
    mixed = save_tiny("mixed", "mixtral", num_local_experts=3, dtype=torch.bfloat16)
    return {case: {"everything": tied, "experts": mixed}.get(case, plain) for case in CASES}


def interrupted(arguments: list, at: int) -> None:
    """Begins a training in this process, and interrupts it before a step."""

    def step(batches: MicroBatches, number: int):
        if number == at:
            raise KeyboardInterrupt
        return original(batches, number)

    original = MicroBatches.step
    with mock.patch.object(MicroBatches, "step", step):
        assert alone(arguments) != 0


def test_two_processes_give_the_update_of_one(models, tmp_path: Path, examples) -> None:
    """Also if one process has begun, and also merged into the model. What fails in one process fails in both."""
    lines = [line(models[case], examples, tmp_path / f"{case}-2", *options) for case, options in CASES.items()]
    merged = [["forget", *line(models["dpo"], examples, tmp_path / f"merged-{count}")[1:]] for count in (1, 2)]
    saving = [*CASES["tensor_adam"], "--save-every", 1]
    continued = line(models["tensor_adam"], examples, tmp_path / "continued", *saving)
    interrupted(continued, at=2)
    assert checkpoints(tmp_path / ".continued.training") == ["step-00000002"]
    options = ["--objective", "grad-ascent", "--learning-rate", 1e9, "--update-dtype", "float16"]
    too_fast = line(models["dpo"], examples, tmp_path / "fast", *options)
    done = run_together([*lines, merged[1], continued, too_fast], tmp_path)
    codes = [0] * (len(CASES) + 2) + [2]
    assert done.stdout.count(f"exit codes {codes}") == 2, done.stdout + done.stderr
    assert done.stderr.count("resuming after step 2 of 4") == 1
    assert done.stderr.count("contains NaN or exceeds the range") == 2
    assert not (tmp_path / "fast").exists()
    assert not [item for item in tmp_path.iterdir() if item.name.startswith(".")]
    for case, options in CASES.items():
        assert alone(line(models[case], examples, tmp_path / f"{case}-1", *options)) == 0
        one, two = (read_all(tmp_path / f"{case}-{count}") for count in (1, 2))
        assert distance(one, two) < TOLERANCE.get(case, 1e-5), case
        if case == "bfloat16":  # on several processes, it is as close to float32
            precise = ["float32" if option == case else option for option in options]
            assert alone(line(models[case], examples, tmp_path / "precise", *precise)) == 0
            full = read_all(tmp_path / "precise")
            assert distance(full, two) < 1.5 * distance(full, one)
    assert distance(read_all(tmp_path / "tensor_adam-1"), read_all(tmp_path / "continued")) < 1e-5
    assert alone(merged[0]) == 0
    first, second = (Checkpoint(tmp_path / f"merged-{count}") for count in (1, 2))
    torch.testing.assert_close(*({name: part.read(name) for name in part.tensors} for part in (first, second)))
    check_files(tmp_path / "everything-2")


def check_files(update: Path) -> None:
    """Several files, each named and listed as in any safetensors directory, and every tensor once."""
    directory = TensorDirectory(update, stem="update")
    files = sorted({info.file for info in directory.tensors.values()})
    assert files == sorted(file.name for file in update.glob("*.safetensors"))
    assert files == [f"update-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 1
    index = json.loads((update / "update.safetensors.index.json").read_text())
    total = sum(info.nbytes for info in directory.tensors.values())
    assert index["metadata"]["total_size"] == total
    assert sum(file.stat().st_size for file in update.glob("*.safetensors")) < total + 10_000


def checkpoints(folder: Path) -> list[str]:
    return [item.name for item in folder.glob("step-*")]


def test_a_killed_process_does_not_cost_the_training(save_tiny, tmp_path: Path, examples, capsys) -> None:
    """Three processes begin, one of them is killed in the middle of the third checkpoint, and one process goes on."""
    options = ["--objective", "pdu", "--dual-warmup", "1", "--save-every", "1", "--optimizer", "adamw_torch", *SMOOTH]
    path, folder = save_tiny(), tmp_path / ".u.training"
    whole, cut = (line(path, examples, tmp_path / name, *options) for name in ("whole", "u"))
    assert run_together([cut], tmp_path, count=3, kill=3).returncode not in (0, FAILED)
    assert checkpoints(folder) == ["step-00000002"]
    assert not (tmp_path / "u").exists()
    assert alone(cut) == 0
    assert "resuming after step 2 of 4" in capsys.readouterr().err
    assert alone(whole) == 0
    assert distance(read_all(tmp_path / "whole"), read_all(tmp_path / "u")) < 1e-5
    assert not list(tmp_path.glob(".*"))
