"""What a package index would deliver: the wheel, installed into an environment with nothing but what it declares."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.environments import ROOT, environment, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("mpunlearn-*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert names == {line.removeprefix("src/") for line in listed.stdout.splitlines() if (ROOT / line).exists()}
    assert {"mpunlearn/py.typed", "mpunlearn/protocol/flower/pyproject.toml"} <= names
    # The README is the page on the index, where relative links lead nowhere.
    assert re.findall(r"\]\((?!https://|#)[^)]*", text) == []


@pytest.mark.slow
def test_the_quick_demo_works_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", "client", wheel=wheel)
    (tmp_path / "empty").mkdir()
    done = run(python, str(python.parent / "mpunlearn"), "demo", "--quick", "--json", cwd=tmp_path / "empty")
    assert done.returncode == 0, done.stderr
    original, retrained, noise_free, hardened = json.loads(done.stdout)["models"]
    assert original["forget"]["probability"] > 0.9
    assert max(model["forget"]["probability"] for model in (retrained, noise_free, hardened)) < 0.15
    assert hardened["retain"]["probability"] > 0.8
    assert hardened["left"] > 0.05
