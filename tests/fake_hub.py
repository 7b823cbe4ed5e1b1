"""A small Hugging Face Hub on the loopback address: repositories, LFS uploads and commits. It keeps all bytes in memory."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hub:
    """What the server has received."""

    url: str = ""
    token: str = "hf_right"
    repositories: dict[str, bool] = field(default_factory=dict)
    """Repository → whether it is private."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 → uploaded bytes."""
    commits: list[dict[str, bytes]] = field(default_factory=list)
    """File → content, for every commit."""


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """Serves an empty hub."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, value: object) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers["Content-Length"]))

        def do_PUT(self) -> None:
            data = self.body()
            digest = self.path.rpartition("/")[2]
            assert hashlib.sha256(data).hexdigest() == digest
            hub.objects[digest] = data
            self.answer(200, {})

        def do_POST(self) -> None:
            data, path = self.body(), self.path.partition("?")[0]
            if path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.answer(401, {"error": "Invalid username or password."})
            elif path == "/api/repos/create":
                asked = json.loads(data)
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                hub.repositories[name] = bool(asked.get("private") or asked.get("visibility") == "private")
                self.answer(200, {"url": f"{hub.url}/{name}"})
            elif "/preupload/" in path:
                files = json.loads(data)["files"]
                modes = {True: "lfs", False: "regular"}
                self.answer(
                    200,
                    {
                        "files": [
                            {"path": file["path"], "shouldIgnore": False,
                             "uploadMode": modes[file["path"].endswith(".safetensors")]}
                            for file in files
                        ]
                    },
                )  # fmt: skip
            elif path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**entry, "actions": {"upload": {"href": f"{hub.url}/upload/{entry['oid']}", "header": {}}}}
                    for entry in json.loads(data)["objects"]
                ]
                self.answer(200, {"transfer": "basic", "objects": objects})
            elif "/commit/" in path:
                files = {}
                for entry in map(json.loads, data.splitlines()):
                    value = entry["value"]
                    if entry["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        files[value["path"]] = hub.objects[value["oid"]]
                hub.commits.append(files)
                repository = path.split("/models/")[1].split("/commit/")[0]
                self.answer(200, {"commitUrl": f"{hub.url}/{repository}/commit/{'0' * 40}", "commitOid": "0" * 40})
            else:
                self.answer(404, {"error": f"no such path {path}"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
