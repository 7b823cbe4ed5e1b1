"""Environments with nothing but what pyproject.toml asks for, made in seconds from the packages that are installed here.

Every package of the closure of an extra is linked into a new virtual environment. So a test sees what someone sees who
installs the extra: a package that is imported and not declared is missing.
"""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import venv
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for: the plain installation, and these extras of it."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    for extra in extras:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            found += declared(*requirement.extras) if requirement.name == "mpunlearn" else [requirement]
    return found


def closure(requirements: Iterable[Requirement]) -> set[str]:
    """The names of the packages that these requirements install."""
    waiting, seen = list(requirements), set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), {"", *requirement.extras}
        for extra in extras:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in importlib.metadata.distribution(name).requires or ():
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return {name for name, _ in seen}


@cache
def owners() -> dict[str, set[str]]:
    """Every entry of site-packages, and every entry of those → the packages that have files there."""
    found = defaultdict(set)
    for distribution in importlib.metadata.distributions():
        name = canonicalize_name(distribution.name)
        for line in (distribution.read_text("RECORD") or "").splitlines():
            parts = line.split(",")[0].split("/")
            if parts[0] not in ("..", "__pycache__"):
                found[parts[0]].add(name)
                found["/".join(parts[:2])].add(name)
    return found


def environment(folder: Path, *extras: str, wheel: Path | None = None) -> Path:
    """Makes an environment with the plain installation and some extras.

    Args:
        folder: a new directory.
        extras: names of extras.
        wheel: a wheel of mpunlearn to install; without one, `src` is linked.

    Returns:
        Its Python interpreter.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    packages = next(folder.glob("lib/python*/site-packages"))
    wanted = closure(declared(*extras))
    source = Path(str(importlib.metadata.distribution("numpy").locate_file("")))
    linked: set[str] = set()
    for entry, by in sorted(owners().items()):
        if by <= wanted and entry.split("/")[0] not in linked:
            (packages / entry).symlink_to(source / entry)
            linked.add(entry)
        elif by & wanted and "/" not in entry:
            (packages / entry).mkdir()  # a namespace that other packages share
    if wheel is None:
        (packages / "mpunlearn").symlink_to(ROOT / "src" / "mpunlearn")
    else:
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
        ]
        subprocess.run([*command, str(wheel)], check=True)
    return python


def run(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the interpreter of an environment, without what this process has on its path."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(python), *arguments], cwd=cwd, env=clean, capture_output=True, text=True, timeout=600, check=False
    )
