"""Each installation does what it says, with nothing but the packages that it declares."""

import re
from pathlib import Path

import pytest
from tests.environments import PROJECT, closure, declared, environment, run

from mpunlearn.extras import EXTRAS

TRAINING = {"transformers", "tokenizers", "accelerate", "datasets", "peft", "pyarrow", "pandas", "rouge-score"}
NEEDS = {
    "client": [
        "run m --forget f --out o",
        "unlearn c --forget f --out o",
        "forget m --forget f --out o",
        "calibrate m --calibration-text t",
        "evaluate m",
        "extract m b --forget f --reference r",
        "client audit u --copy c --forget f",
        "client review c --public-text p",
        "client work --spool s --policy p --forget f",
        "ask m --question q",
        "plan m --forget f",
        "push m o/n",
        "demo",
        "network-demo",
        "example e",
    ],
    "audit": ["audit --model m --copies c"],
    "network": ["server start m --run r --insecure", "server resume r", "client join i"],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Path:
    """The interpreter of the plain installation."""
    return environment(tmp_path_factory.mktemp("plain") / "venv")


@pytest.fixture(scope="module")
def auditor(tmp_path_factory) -> Path:
    """The interpreter of the installation with the extra audit."""
    return environment(tmp_path_factory.mktemp("audit") / "venv", "audit")


def test_the_table_of_extras_is_that_of_the_package() -> None:
    for extra, modules in EXTRAS.items():
        requirements = PROJECT["optional-dependencies"][extra]
        assert {re.split(r"[<>=]", text)[0].replace("-", "_") for text in requirements} == set(modules)


@pytest.mark.parametrize("extras", [(), ("server",)])
def test_the_servers_installations_have_no_training_library(extras: tuple[str, ...]) -> None:
    assert not closure(declared(*extras)) & TRAINING


@pytest.mark.slow
def test_a_server_without_training_libraries_publishes_aggregates_and_audits(
    auditor: Path, tmp_path: Path, save_tiny
) -> None:
    steps = (
        "from pathlib import Path\n"
        "from mpunlearn import Perturbation, postprocess, preprocess\n"
        "from mpunlearn.audit.audit import audit\n"
        "from mpunlearn.checkpoint import Checkpoint\n"
        "published = preprocess('model', state='state', out='copies', perturbation=Perturbation(copies=3, kappa=0.01,\n"
        "    common_noise=0.0))\n"
        "postprocess(published.copies, state='state', out='final')\n"
        "found = audit(model='model', copies=[str(copy) for copy in published.copies])\n"
        "print(min(attack.error for attack in found.attacks.values()))\n"
    )
    save_tiny(name="model")
    done = run(auditor, "-W", "error", "-c", steps, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 0.01  # without common noise, the copies disclose the model
    assert (tmp_path / "final" / "model.safetensors").exists()


@pytest.mark.parametrize(("extra", "line"), [(extra, line) for extra, lines in NEEDS.items() for line in lines])
def test_a_command_names_the_extra_that_it_needs_before_it_does_anything(
    server: Path, tmp_path: Path, extra: str, line: str
) -> None:
    done = run(server, "-m", "mpunlearn.cli", *line.split(), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"pip install 'mpunlearn[{extra}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
