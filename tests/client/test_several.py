"""Training on several processes: the update of one process, in one directory, and resumed after one of them was killed."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from tests.client.several import FAILED, run_together
from tests.client.training import distance, read_all

from mpunlearn.checkpoint import Checkpoint, TensorDirectory
from mpunlearn.cli import main
from mpunlearn.client.batches import MicroBatches

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::mpunlearn.DisclosureWarning")]

CASES: dict[str, list] = {
    "tensor_adam": ["--objective", "npo", "--optimizer", "tensor_adam"],
    "reference": ["--objective", "grad-diff", "--retain-loss", "kl", "--cpu-offload"],
    "ngdiff": ["--objective", "ngdiff"],
    "pdu": ["--objective", "pdu", "--dual-warmup", "1"],
    "dpo": ["--objective", "dpo"],
    "lora": ["--objective", "npo", "--lora-rank", "3", "--gradient-checkpointing"],
    "lora-reference": ["--objective", "undial", "--lora-rank", "2"],
    "everything": ["--objective", "npo", "--train", "all", "--gradient-checkpointing"],
    "experts": ["--objective", "npo", "--train", "experts"],
    "bfloat16": ["--objective", "grad-diff", "--precision", "bfloat16", "--optimizer", "sgd", "--learning-rate", "0.1"],
}
TOLERANCE = {"bfloat16": 0.1, "lora-reference": 1e-3}


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


def test_two_processes_give_the_update_of_one(models, tmp_path: Path, examples) -> None:
    lines = [line(models[case], examples, tmp_path / f"{case}-2", *options) for case, options in CASES.items()]
    merged = [["forget", *line(models["dpo"], examples, tmp_path / f"merged-{count}")[1:]] for count in (1, 2)]
    done = run_together([*lines, merged[1]], tmp_path)
    assert done.returncode == 0, done.stderr
    assert alone(merged[0]) == 0
    one, two = (Checkpoint(tmp_path / f"merged-{count}") for count in (1, 2))
    torch.testing.assert_close(*({name: part.read(name) for name in part.tensors} for part in (one, two)))
    for case, options in CASES.items():
        assert alone(line(models[case], examples, tmp_path / f"{case}-1", *options)) == 0
        one, two = (read_all(tmp_path / f"{case}-{count}") for count in (1, 2))
        assert distance(one, two) < TOLERANCE.get(case, 1e-5), case
    assert not [item for item in tmp_path.iterdir() if item.name.startswith(".")]
    # Both have written, no tensor twice.
    directory = TensorDirectory(tmp_path / "everything-2", stem="update")
    files = sorted({info.file for info in directory.tensors.values()})
    assert files == sorted(file.name for file in directory.path.glob("*.safetensors"))
    assert files == [f"update-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 1
    index = json.loads((directory.path / "update.safetensors.index.json").read_text())
    sizes = [info.nbytes for info in directory.tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert sum(file.stat().st_size for file in directory.path.glob("*.safetensors")) < sum(sizes) + 10_000


def test_what_fails_in_one_process_fails_in_all_and_leaves_nothing(save_tiny, tmp_path: Path, examples) -> None:
    too_fast = line(
        save_tiny(),
        examples,
        tmp_path / "u",
        "--objective",
        "grad-ascent",
        "--learning-rate",
        1e9,
        "--update-dtype",
        "float16",
    )
    done = run_together([too_fast], tmp_path)
    assert done.returncode != 0
    assert done.stdout.count("exit codes [2]") == 2, done.stdout + done.stderr
    assert done.stderr.count("contains NaN or exceeds the range") >= 2
    assert not list(tmp_path.glob("*u*.partial"))
    assert not (tmp_path / "u").exists()


def test_a_killed_process_does_not_cost_the_training(save_tiny, tmp_path: Path, examples, capsys, monkeypatch) -> None:
    """Begun by three processes, of which one is killed in the middle of the third checkpoint; then by two; then by one."""
    options = ["--objective", "pdu", "--dual-warmup", "1", "--save-every", "1", "--optimizer", "adamw_torch"]
    path, folder = save_tiny(), tmp_path / ".u.training"
    whole, cut = (line(path, examples, tmp_path / name, *options) for name in ("whole", "u"))
    assert run_together([cut], tmp_path, count=3, kill=3).returncode not in (0, FAILED)
    assert [item.name for item in folder.glob("step-*")] == ["step-00000002"]
    assert not (tmp_path / "u").exists()
    assert run_together([cut], tmp_path, count=2, kill=2).returncode not in (0, FAILED)
    assert [item.name for item in folder.glob("step-*")] == ["step-00000003"]
    steps = []
    original = MicroBatches.step
    monkeypatch.setattr(MicroBatches, "step", lambda batches, number: steps.append(number) or original(batches, number))
    assert alone(cut) == 0
    assert steps[0] == 3
    assert "resuming after step 3 of 4" in capsys.readouterr().err
    assert alone(whole) == 0
    assert distance(read_all(tmp_path / "whole"), read_all(tmp_path / "u")) < 1e-5
    losses = itertools.chain(tmp_path.glob(".*"), tmp_path.glob("*.partial"))
    assert not list(losses)


def test_several_processes_go_on_from_the_checkpoint_of_one(save_tiny, tmp_path: Path, examples, monkeypatch) -> None:
    options = ["--objective", "npo", "--save-every", "1", "--lora-rank", "3", "--optimizer", "tensor_adam"]
    path, original = save_tiny(), MicroBatches.step
    whole, cut = (line(path, examples, tmp_path / name, *options) for name in ("whole", "u"))

    def step(batches: MicroBatches, number: int):
        if number == 2:
            raise KeyboardInterrupt
        return original(batches, number)

    with monkeypatch.context() as patched:
        patched.setattr(MicroBatches, "step", step)
        assert alone(cut) != 0
    assert [item.name for item in (tmp_path / ".u.training").glob("step-*")] == ["step-00000002"]
    done = run_together([cut], tmp_path)
    assert done.returncode == 0, done.stderr
    assert alone(whole) == 0
    assert distance(read_all(tmp_path / "whole"), read_all(tmp_path / "u")) < 1e-5
