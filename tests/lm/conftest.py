"""A stand-in for the Hugging Face hub that notes who asks it for what, to see what leaves this machine."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

READ = """
import sys
from mpunlearn.errors import DataError
from mpunlearn.lm.records import read_records
for source in sys.argv[1:]:
    try:
        read_records(source)
    except DataError as error:
        print(error)
"""
"""A program that prints the errors of reading sources."""


class Hub:
    """A hub without repositories, on the loopback address."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        """The paths of all requests during the last program."""
        self.code = (404, "RepoNotFound")
        """Status and error code of every answer."""
        asked, hub = self.asked, self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(hub.code[0])
                self.send_header("X-Error-Code", hub.code[1])
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self._folder = folder
        self._environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HOME": str(folder / "hf-home"),
            "HF_HUB_OFFLINE": "0",
        }

    def run(self, script: str, *arguments: str) -> list[str]:
        """The lines that a program prints that has this hub and its own cache."""
        self.asked.clear()
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=self._folder, env=self._environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def errors(self, *sources: str) -> list[str]:
        """The errors of reading sources in a program that has this hub."""
        return self.run(READ, *sources)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
