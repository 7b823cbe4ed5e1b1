"""Every command and program in the README's sections for one machine, run as a reader would."""

import re
import shlex
from pathlib import Path

import pytest

from mpunlearn.checkpoint import checkpoint_digest
from mpunlearn.cli import main
from mpunlearn.files import read_json

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(heading: str) -> list[str]:
    """The fenced blocks below a heading, up to the next one."""
    section = README.split(f"\n{heading}\n")[1]
    section = re.split(r"\n##+ ", section)[0]
    return re.findall(r"```\w*\n(.*?)```", section, re.DOTALL)


def commands(block: str) -> list[str]:
    """The commands of a block, without comments and with continued lines joined."""
    lines = (line.split(" # ")[0].strip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line.startswith("mpunlearn ")]


@pytest.fixture
def example(tmp_path: Path, monkeypatch) -> Path:
    """Where `mpunlearn example try && cd try` leads to."""
    monkeypatch.chdir(tmp_path)
    first = commands(blocks("## Unlearn something")[0])[0]
    assert first == "mpunlearn example try && cd try"
    assert main(["example", "try", "--quiet"]) == 0
    monkeypatch.chdir(tmp_path / "try")
    return tmp_path / "try"


@pytest.mark.slow
def test_unlearn_something(example: Path, capsys) -> None:
    shell, python = blocks("## Unlearn something")
    for command in commands(shell)[1:]:
        assert main(shlex.split(command)[1:]) == 0, command
    assert "nothing was unlearned" not in capsys.readouterr().err
    result = read_json(example / "result.json")
    assert result["metrics"]["forget_Q_A_Prob"] < 0.2 < 0.8 < result["metrics"]["retain_Q_A_Prob"]
    assert result["retrained"]["forget_Q_A_Prob"] < 0.2
    exec(compile(python, "README.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[-1]) < 0.2


@pytest.mark.slow
def test_step_by_step(example: Path) -> None:
    (block,) = blocks("### Step by step")
    preprocess, unlearn, postprocess = commands(block)
    assert main(shlex.split(preprocess)[1:]) == 0
    for copy in (1, 2, 3):
        assert main(shlex.split(unlearn.replace("copy-1", f"copy-{copy}"))[1:]) == 0
    assert main(shlex.split(postprocess)[1:]) == 0
    assert checkpoint_digest(example / "unlearned") != checkpoint_digest(example / "model")


def test_every_command_in_the_documentation_is_parsed() -> None:
    from mpunlearn.cli import PREFIXES, VERBS
    from mpunlearn.options import parse

    pages = [README, *(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))]
    lines = [
        line for page in pages for block in re.findall(r"```\w*\n(.*?)```", page, re.DOTALL) for line in commands(block)
    ]
    assert len(lines) > 12
    for line in lines:
        words = shlex.split(line.split(" && ")[0])[1:]
        name = " ".join(words[: 2 if words[0] in PREFIXES else 1])
        arguments = [word for word in words[len(name.split()) :] if word != "run.yaml"]
        arguments.remove("--config") if "--config" in arguments else None
        assert parse(f"mpunlearn {name}", VERBS[name].function(name), arguments) is not None, line
