"""The five verbs from the command line, as in the README."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpunlearn.checkpoint import Checkpoint, checkpoint_digest
from mpunlearn.cli import COMMANDS, main, parse


def test_a_round_by_hand(save_tiny, tmp_path: Path, examples, monkeypatch, capsys) -> None:
    save_tiny("model")
    monkeypatch.chdir(tmp_path)
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


def test_a_run_and_a_configuration_file(save_tiny, tmp_path: Path, examples, monkeypatch) -> None:
    save_tiny("model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "forget: forget.jsonl\nretain: retain.jsonl\nrounds: 2\ncopies: 2\nepochs: 1\nalphas: 1,2\nlearning_rate: 1e-4\n"
    )
    assert main("run model --config run.yaml --out by-file --batch-size 3".split()) == 0
    arguments = "run model --forget forget.jsonl --retain retain.jsonl --rounds 2 --copies 2 --epochs 1 --alphas 1,2"
    assert main(f"{arguments} --learning-rate 1e-4 --batch-size 3 --out by-options".split()) == 0
    plans = [(tmp_path / name / "server" / "plan.json").read_text() for name in ("by-file", "by-options")]
    assert plans[0] == plans[1]
    assert (tmp_path / "by-file" / "final" / "config.json").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        "preprocess model --state s --out c --copies 0",
        "preprocess model --state s --out c --kappa -1",
        "preprocess model --state s --out c --alphas 1,2",
        "preprocess nowhere --state s --out c",
        "preprocess forget.jsonl --state s --out c",
        "unlearn model --forget forget.jsonl --objective npo --out u",
        "unlearn model --forget nowhere --objective grad-ascent --out u",
        "postprocess --state s model --out c",
        "run model --forget forget.jsonl --rounds 0 --out r",
        "server start model --run r",
        "server start model --run r --insecure true --host 0.0.0.0",
        "server start model --run . --insecure true",
        "server start model --run r --trust nowhere.json",
        "server start model --run r --insecure true --clients 2 --weights 1",
        "server resume nowhere",
        "server status nowhere",
        "client join nowhere.json",
        "client join forget.jsonl",
        "client work --spool s --policy nowhere.toml --forget forget.jsonl",
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    save_tiny, tmp_path, examples, monkeypatch, capsys, arguments
) -> None:
    save_tiny("model")
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    verb = max((verb for verb in COMMANDS if arguments.startswith(verb)), key=len)
    assert error.startswith(f"mpunlearn {verb}: ")
    assert error.count("\n") == 1
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        "preprocess",
        "preprocess m --state s --out c --kappa x",
        "run m --color red",
        "preprocess m --state s --alphas a,b",
    ],
)
def test_bad_options_are_explained_by_the_parser(arguments: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


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
    assert main("preprocess model --state s --out c --kappa 0.00001".split()) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == ["c/copy-1", "c/copy-2", "c/copy-3"]
    assert "bits of doubt" in captured.err
    assert "warning: rounding undoes the noise" in captured.err


def test_help_of_every_command(capsys) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    for verb in COMMANDS:
        assert verb in overview
        with pytest.raises(SystemExit) as stopped:
            main([verb, "--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert "usage: mpunlearn " + verb in text
        if verb == "unlearn":
            assert "--learning-rate" in text
            assert "_rate" not in text.replace("LEARNING_RATE", "")
    assert main(["forgive"]) == 2
    assert main(["--version"]) == 0


def test_every_parameter_of_every_command_reaches_its_function() -> None:
    import mpunlearn

    given = parse(
        "run",
        mpunlearn.run,
        "model --forget f --out o --rounds 7 --eta 0.5 --base b --keep-exchange true --copies 4 --kappa 0.2 "
        "--noise-scope layers --denoising extrapolate --publish-dtype bfloat16 --reparameterization paper "
        "--objective grad-diff --gamma 2 --seed 3 --train all".split(),
    )
    assert (given["checkpoint"], given["forget"], given["out"], given["base"], given["retain"]) == (
        "model",
        "f",
        "o",
        "b",
        None,
    )
    assert (given["rounds"], given["eta"], given["keep_exchange"]) == (7, 0.5, True)
    perturbation, training = given["perturbation"], given["training"]
    assert (perturbation.copies, perturbation.kappa, perturbation.noise_scope) == (4, 0.2, "layers")
    assert (perturbation.denoising, perturbation.publish_dtype) == ("extrapolate", "bfloat16")
    assert (perturbation.reparameterization, perturbation.alphas) == ("paper", None)
    assert (training.objective, training.gamma, training.seed, training.train) == ("grad-diff", 2.0, 3, "all")


def test_the_server_loads_no_training_library_and_nothing_of_the_client() -> None:
    script = (
        "import sys, mpunlearn.server; "
        "heavy = {'transformers', 'accelerate', 'tokenizers', 'mpunlearn.client', 'mpunlearn.evaluation'}; "
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
