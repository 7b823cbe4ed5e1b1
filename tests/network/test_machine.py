"""The server's own machine: what another user of it can do, and what Flower's programs can open."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.network.federation import tiny_world

from mpunlearn.protocol.flower import sandbox
from mpunlearn.protocol.flower.keys import certificates, client_keys
from mpunlearn.protocol.flower.programs import environment, free_port, kill_orphans, script, wait_for_port
from mpunlearn.server.network.folder import RunFolder
from mpunlearn.server.network.superlink import SuperLink
from mpunlearn.server.plan import RunPlan, Service

pytest.importorskip("flwr")
linux = pytest.mark.skipif(not sandbox.version(), reason="needs a kernel with Landlock")
APP = """
from pathlib import Path
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    out = Path(context.run_config["out"])
    try:
        text = Path(context.run_config["secret"]).read_text()
    except OSError as error:
        text = type(error).__name__
    (out.parent / "part").write_text(text)
    (out.parent / "part").rename(out)
"""
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "thief"
version = "1.0.0"
license = "MIT"
dependencies = []
[tool.hatch.build.targets.wheel]
packages = ["thief"]
[tool.flwr.app]
publisher = "nobody"
[tool.flwr.app.components]
serverapp = "thief.app:app"
clientapp = "thief.app:app"
[tool.flwr.app.config]
secret = ""
out = ""
"""


RUN = """
import os, sys
import encodings.idna
from flwr.cli.app import app

user, arguments = int(sys.argv[1]), sys.argv[2:]
os.setgroups([]), os.setgid(user), os.setuid(user)
app(arguments)
"""
"""Flower's command as another user. It is imported first, since that user may not be able to read the interpreter."""


class Thief:
    """A user of the machine with the certificate of invitation.json, which is not secret, and an app that reads a file.

    Args:
        folder: a folder of this user's own.
        port: port of the SuperLink.
        ca: the certificate.
        user: the user's name.
    """

    def __init__(self, folder: Path, port: int, ca: Path, user: str) -> None:
        self.folder, self.user = folder, pwd.getpwnam(user)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "thief" / "thief").mkdir(parents=True)
        (folder / "thief" / "pyproject.toml").write_text(PROJECT)
        (folder / "thief" / "thief" / "__init__.py").write_text("")
        (folder / "thief" / "thief" / "app.py").write_text(APP)
        shutil.copy(ca, folder / "ca.crt")
        (folder / "config.toml").write_text(
            f'[superlink]\ndefault = "x"\n[superlink.x]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{folder}/ca.crt"\n'
        )
        self.environment = environment(folder)
        for path in (folder, *folder.rglob("*")):
            os.chown(path, self.user.pw_uid, self.user.pw_gid)
            path.chmod(0o755 if path.is_dir() else 0o644)

    def steal(self, secret: Path, out: Path) -> subprocess.CompletedProcess[str]:
        """Starts a run of the app that copies the secret to `out`."""
        config = f'secret="{secret}" out="{out}"'
        command = [
            sys.executable,
            "-c",
            RUN,
            str(self.user.pw_uid),
            "run",
            str(self.folder / "thief"),
            "x",
            "-c",
            config,
        ]
        return subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60
        )


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def wait_for(path: Path, seconds: float = 40) -> str:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} has not appeared"
        time.sleep(0.1)
    return path.read_text()


@linux
@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to act as another user")
def test_another_user_runs_no_code_here_and_flower_cannot_open_the_secret(tmp_path: Path, open_folder: Path) -> None:
    """The attack succeeds against Flower's SuperLink as it comes, and fails against ours, even from the own user."""
    tiny_world(tmp_path)
    folder = RunFolder(tmp_path / "run")
    folder.make()
    secret = tmp_path / "run" / "state" / "secret.key"
    secret.parent.mkdir(mode=0o700)
    secret.write_text("the secret")
    secret.chmod(0o600)

    home, port = tmp_path / "plain", free_port()
    ca, certificate, key = certificates(home, "127.0.0.1")
    options = ["--ssl-ca-certfile", ca, "--ssl-certfile", certificate, "--ssl-keyfile", key, "--enable-supernode-auth"]
    options += ["--host", "127.0.0.1", "--port", port, "--database", home / "superlink.db"]
    plain = subprocess.Popen([script("flower-superlink"), *map(str, options)], env=environment(home))
    try:
        wait_for_port(port, 60, "the plain SuperLink")
        done = Thief(open_folder / "nobody", port, ca, "nobody").steal(secret, tmp_path / "stolen")
        assert done.returncode == 0, done.stdout + done.stderr
        assert wait_for(tmp_path / "stolen") == "the secret"
    finally:
        plain.kill()
        plain.wait()
        kill_orphans(home)

    service = Service("127.0.0.1", free_port(), "127.0.0.1", clients=[client_keys(tmp_path / "client")])
    link = SuperLink(folder, RunPlan(checkpoint=str(tmp_path / "model"), service=service))
    link.start()
    try:
        wait_for(folder.mail / "alive")  # the courier does its work within its folders
        ca = folder.flower / "ca.crt"
        done = Thief(open_folder / "nobody", link._port, ca, "nobody").steal(secret, folder.mail / "stolen")
        assert done.returncode != 0
        own = Thief(open_folder / "own", link._port, ca, "root").steal(secret, folder.mail / "own")
        assert own.returncode == 0, own.stdout + own.stderr
        assert wait_for(folder.mail / "own") == "PermissionError"
        assert not (folder.mail / "stolen").exists()
    finally:
        link.stop()


@linux
def test_a_confined_process_opens_nothing_but_its_folders(tmp_path: Path) -> None:
    for name in ("inside", "outside", "readable"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside" / "file")
    code = f"""
import os, signal
from pathlib import Path
from mpunlearn.protocol.flower.sandbox import confine
here = Path({str(tmp_path)!r})
assert confine([here / "readable"], [here / "inside"])
import json.tool, ctypes  # the system's libraries can still be loaded
assert (here / "inside" / "file").read_text() == "inside"
assert (here / "readable" / "file").read_text() == "readable"
(here / "inside" / "new").write_text("x")
(here / "inside" / "new").rename(here / "inside" / "newer")
def refused(what):
    try:
        what()
    except (PermissionError, OSError) as error:
        return error.errno in (1, 13, 18)
    return False
parent = os.getppid()
assert [refused(what) for what in (
    (here / "outside" / "file").read_text,
    (here / "inside" / "link").read_text,
    lambda: (here / "outside" / "new").write_text("x"),
    lambda: (here / "readable" / "file").write_text("x"),
    lambda: os.link(here / "outside" / "file", here / "inside" / "linked"),
    lambda: os.listdir(here / "outside"),
    lambda: open(f"/proc/{{parent}}/environ", "rb").read(),
    lambda: open(f"/proc/{{parent}}/mem", "rb"),
    lambda: os.kill(parent, 0),
    lambda: os.symlink(here / "outside" / "file", here / "inside" / "planted"),
    lambda: os.mkfifo(here / "inside" / "pipe"),
)] == 11 * [True]
assert os.system(f"cat {{here}}/outside/file 2>/dev/null") != 0  # nor do its children
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_environment_of_flower_holds_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:hush@proxy")
    assert "hush" not in str(environment(tmp_path))
    assert environment(tmp_path)["FLWR_HOME"] == str(tmp_path)


def test_the_owner_of_a_connection_is_known(tmp_path: Path) -> None:
    import socket

    if not sandbox.knows_owners():
        pytest.skip("this system does not know")
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as listener:
            try:
                listener.bind((host, 0))
            except OSError:
                continue  # no IPv6
            listener.listen()
            with socket.create_connection(listener.getsockname()[:2]) as client:
                accepted, address = listener.accept()
                with accepted:
                    assert sandbox.owner(address, accepted.getsockname()) == os.geteuid()
                    client.close()
                    assert sandbox.owner(address, accepted.getsockname()) is None
