"""The documentation, run as a reader would: every command is parsed, and every block that is marked is executed.

A comment before a block says what to do with it: `<!-- run -->` executes it, `<!-- run in example -->` does so in the
directory that `mpunlearn example try` writes, and `<!-- file NAME -->` writes it to a file. The blocks of a page run in order,
in a directory of their own. All other commands, such as those with placeholders or for two machines, are parsed only.
"""

import json
import re
import shlex
import subprocess
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from mpunlearn.checkpoint import checkpoint_digest
from mpunlearn.cli import PREFIXES, VERBS, main
from mpunlearn.files import read_json
from mpunlearn.options import parse

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^[ ]*<!-- (?P<mark>(?:run|file)\b.*?) -->\n)?^(?P<indent>[ ]*)```(?P<kind>\w*)\n(?P<text>.*?)^(?P=indent)```", re.M | re.S)  # fmt: skip  # noqa: E501


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    mark: str
    kind: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, without comments and with continued lines joined."""
        lines = (re.split(r"(?:^|\s)#\s", line)[0].strip() for line in self.text.replace("\\\n", " ").splitlines())
        return [line for line in lines if line]


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(match["mark"] or "", match["kind"], dedent(match["text"])) for match in found]


def execute(page: Path, monkeypatch) -> None:
    """Runs the marked blocks of a page in the current directory."""
    for block in blocks(page):
        if block.mark == "run in example":
            assert main(["example", "try", "--quiet"]) == 0
            monkeypatch.chdir("try")
        if block.mark.startswith("file "):
            Path(block.mark.removeprefix("file ")).write_text(block.text, encoding="utf-8")
        elif block.kind == "python" and block.mark:
            exec(compile(block.text, page.name, "exec"), {})
        elif block.mark:
            for line in (part.strip() for command in block.commands for part in command.split(" && ")):
                word, *rest = shlex.split(line)
                if word == "cd":
                    monkeypatch.chdir(rest[0])
                else:
                    assert word == "mpunlearn", line
                    assert main(rest) == 0, line


@pytest.mark.slow
def test_the_readme(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    execute(README, monkeypatch)
    output = capsys.readouterr()
    assert "nothing was unlearned" not in output.err
    result = read_json(tmp_path / "try" / "result.json")
    assert result["metrics"]["forget_Q_A_Prob"] < 0.2 < 0.8 < result["metrics"]["retain_Q_A_Prob"]
    assert result["retrained"]["forget_Q_A_Prob"] < 0.2
    assert float(output.out.split()[-1]) < 0.2


@pytest.mark.slow
@pytest.mark.docs
@pytest.mark.parametrize(
    "page", [page for page in PAGES[1:] if any(block.mark for block in blocks(page))], ids=lambda page: page.stem
)
def test_a_page(page: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    execute(page, monkeypatch)
    assert "nothing was unlearned" not in capsys.readouterr().err


@pytest.mark.slow
def test_step_by_step(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["example", "try", "--quiet"]) == 0
    monkeypatch.chdir("try")
    (block,) = (block for block in blocks(ROOT / "docs/guides/own-model.md") if "mpunlearn postprocess" in block.text)
    preprocess, unlearn, postprocess = block.commands
    assert main(shlex.split(preprocess)[1:]) == 0
    for copy in (1, 2, 3):
        assert main(shlex.split(unlearn.replace("copy-1", f"copy-{copy}"))[1:]) == 0
    assert main(shlex.split(postprocess)[1:]) == 0
    assert checkpoint_digest(Path("unlearned")) != checkpoint_digest(Path("model"))


def test_every_command_in_the_documentation_is_parsed() -> None:
    lines = [line for page in PAGES for block in blocks(page) for line in block.commands if block.kind in ("", "sh")]
    lines = [line.replace("torchrun --nproc-per-node 2 -m mpunlearn.cli", "mpunlearn") for line in lines]
    lines = [line for line in lines if line.startswith("mpunlearn ")]
    assert len(lines) > 25
    for line in lines:
        words = shlex.split(line.split(" && ")[0])[1:]
        name = " ".join(words[: 2 if words[0] in PREFIXES else 1])
        arguments = [word for word in words[len(name.split()) :] if not word.endswith(".yaml") or "=" in word]
        for option in ("--config", "--plan", "--print-config"):
            arguments.remove(option) if option in arguments else None
        assert parse(f"mpunlearn {name}", VERBS[name].function(name), arguments) is not None, line


def test_the_scripts_for_other_schedulers_are_well_formed() -> None:
    """The shell accepts the Slurm scripts; and what the Kubernetes Job runs is a command of the package."""
    found = blocks(ROOT / "docs/guides/engines.md")
    for block in found:
        if block.kind == "sh":
            subprocess.run(["sh", "-n"], input=block.text, text=True, check=True)
    (job,) = (yaml.safe_load(block.text) for block in found if block.kind == "yaml")
    assert (job["kind"], job["spec"]["completionMode"]) == ("Job", "Indexed")
    shell, _, line = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert line.endswith(f"/{job['spec']['completions']}")
    words = shlex.split(line.replace("$((JOB_COMPLETION_INDEX + 1))", "1"))
    assert (shell, words[:2]) == ("sh", ["mpunlearn", "preprocess"])
    assert parse("mpunlearn preprocess", VERBS["preprocess"].function("preprocess"), words[2:]) is not None


def test_every_link_to_a_page_or_file_of_the_documentation_leads_somewhere() -> None:
    """Also those with a heading. Those in the README are absolute, since a package index shows it, too."""
    here, raw = ("https://github.com/mpunlearn/mpunlearn/blob/main/", "https://raw.githubusercontent.com/mpunlearn/mpunlearn/main/")  # fmt: skip  # noqa: E501
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
            link, _, heading = (target[0] or target[1]).partition("#")
            if link.startswith((here, raw)):
                file = ROOT / link.removeprefix(here).removeprefix(raw)
            elif link.startswith("http"):
                continue
            else:
                assert page != README or not link, f"README.md: {link} is relative"
                file = (page.parent / link) if link else page
            assert file.exists(), f"{page.name}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
                assert heading in slugs, f"{page.name}: {link}#{heading}"


def test_the_picture_is_complete_by_itself() -> None:
    root = xml.etree.ElementTree.parse(ROOT / "docs" / "protocol.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.get("aria-labelledby") == "title desc"
    assert {root.find(f"{space}{name}").get("id") for name in ("title", "desc")} == {"title", "desc"}
    assert "prefers-color-scheme: dark" in root.find(f"{space}style").text


@pytest.mark.slow
def test_the_notebook(tmp_path: Path, monkeypatch, capsys) -> None:
    """Its code cells, in one namespace and in order. What they show is stored in the file and is not compared."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["forgotten"] < 0.3 < 0.8 < names["kept"]
