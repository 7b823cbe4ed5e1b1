"""Files that move by reference: what is not followed, not shown and not left half-written."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mpunlearn.errors import DamagedError, NetworkError


@pytest.mark.slow
def test_an_error_does_not_show_a_signature(tmp_path: Path) -> None:
    from mpunlearn.protocol.messages import File
    from mpunlearn.protocol.transfer import fetch, put

    url = "http://127.0.0.1:9/bucket/key?X-Amz-Signature=hush"
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(NetworkError) as caught:
        fetch(url, File("x", 1, "0" * 64), tmp_path / "x")
    assert "hush" not in str(caught.value)
    assert "127.0.0.1:9/bucket/key" in str(caught.value)
    with pytest.raises(NetworkError) as caught:
        put(tmp_path / "file", url)
    assert "hush" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_links_and_pipes_in_a_store_are_not_followed(tmp_path: Path) -> None:
    from mpunlearn.protocol.messages import File
    from mpunlearn.protocol.transfer import fetch, put

    (tmp_path / "store").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "store" / "link").symlink_to(tmp_path / "precious")
    with pytest.raises(NetworkError, match="leads through a symbolic link"):
        put(tmp_path / "file", (tmp_path / "store" / "link" / "0").as_uri())
    assert not list((tmp_path / "precious").iterdir())
    os.mkfifo(tmp_path / "store" / "pipe")
    (tmp_path / "store" / "away").symlink_to(tmp_path / "file")
    listed = File("x", 1, hashlib.sha256(b"x").hexdigest())
    for name in ("pipe", "away", "link", "nothing"):
        with pytest.raises(DamagedError):
            fetch((tmp_path / "store" / name).as_uri(), listed, tmp_path / "got")
    put(tmp_path / "file", (tmp_path / "store" / "deep" / "0").as_uri())
    fetch((tmp_path / "store" / "deep" / "0").as_uri(), listed, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == b"x"


@pytest.mark.slow
def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    from mpunlearn.protocol.messages import File
    from mpunlearn.protocol.transfer import fetch

    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302 if self.path == "/away" else 200)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "1")
            self.end_headers()
            self.wfile.write(b"x")

        def log_message(self, *_: Any) -> None:
            pass

    listed = File("x", 1, hashlib.sha256(b"x").hexdigest())
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(NetworkError):
            fetch(f"{url}/away", listed, tmp_path / "away")
        fetch(f"{url}/here", listed, tmp_path / "here")
        server.shutdown()
    assert "/elsewhere" not in asked
    assert (tmp_path / "here").read_bytes() == b"x"
    assert not (tmp_path / "away").exists()


def test_no_write_and_no_removal_in_a_store_follows_a_planted_link(tmp_path: Path) -> None:
    """A file of the store, or a folder on the way to it, was replaced by a link to what the server must not touch."""
    from mpunlearn.protocol.transfer import Store, put

    (tmp_path / "store").mkdir()
    (tmp_path / "private" / "round-1").mkdir(parents=True)
    (tmp_path / "private" / "secret.key").write_text("secret")
    (tmp_path / "private" / "round-1" / "file").write_text("precious")
    (tmp_path / "file").write_bytes(b"x")
    store, before = Store(str(tmp_path / "store")), sorted((tmp_path / "private").rglob("*"))
    (tmp_path / "store" / "run").mkdir()
    (tmp_path / "store" / "run" / "model").symlink_to(tmp_path / "private" / "secret.key")
    store.put(tmp_path / "file", "run/model")
    assert (tmp_path / "store" / "run" / "model").read_bytes() == b"x"
    (tmp_path / "store" / "planted").symlink_to(tmp_path / "private")
    for act in (
        lambda: store.put(tmp_path / "file", "planted/secret.key"),
        lambda: store.put(tmp_path / "file", "planted/new/secret.key"),
        lambda: store.remove("planted/round-1"),
        lambda: put(tmp_path / "file", store.slot("planted/secret.key")),
        lambda: put(tmp_path / "file", (tmp_path / "store" / ".." / "private" / "secret.key").as_uri()),
    ):
        with pytest.raises((NetworkError, DamagedError)):
            act()
    store.remove("planted")  # the link, not what it leads to
    assert not (tmp_path / "store" / "planted").is_symlink()
    assert (tmp_path / "private" / "secret.key").read_text() == "secret"
    assert sorted((tmp_path / "private").rglob("*")) == before


def test_a_folder_that_is_swapped_for_a_link_meanwhile_leads_nowhere(tmp_path: Path) -> None:
    from threading import Event, Thread

    from mpunlearn.protocol.transfer import Store

    (tmp_path / "store" / "run").mkdir(parents=True)
    (tmp_path / "private").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    store, over = Store(str(tmp_path / "store")), Event()

    def swap() -> None:
        run, aside = tmp_path / "store" / "run", tmp_path / "store" / "aside"
        while not over.is_set():
            for step in (
                lambda: run.rename(aside),
                lambda: run.symlink_to(tmp_path / "private"),
                run.unlink,
                lambda: aside.rename(run),
            ):
                with suppress(OSError):  # a put has created the folder meanwhile
                    step()

    swapping = Thread(target=swap)
    swapping.start()
    try:
        for number in range(300):
            with suppress(NetworkError, DamagedError, OSError):
                store.put(tmp_path / "file", f"run/{number}")
    finally:
        over.set()
        swapping.join()
    assert not list((tmp_path / "private").iterdir())
