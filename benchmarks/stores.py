"""Measures object stores: two libraries, s3fs and obstore, as the passes use one, and the passes themselves.

A server of the moto package, in a process of its own, plays S3. Each library, also in its own process, writes an object in
parts and reads it back in ranges on as many threads as the passes use. The server is slow, so the seconds say little; the
processor time of the client and its memory are what the passes have to share with it.

With --model, both passes run over a random model of these shapes in that store, each in its own process; with what the
process wrote to the local disk, as the system counts it.

    python benchmarks/stores.py [--megabytes 1024]        # needs boto3, moto[server], s3fs and obstore
    python benchmarks/stores.py --model qwen2.5-0.5b [--layers 2]
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpunlearn.server.perturbation import Perturbation
from mpunlearn.server.stream import THREADS
from mpunlearn.tables import markdown
from shapes import MODELS, build, synthetic_update

PART, RANGE = 1 << 25, 1 << 23
"""Bytes of a part that is written, and of a range that is read."""
LIBRARIES = ("s3fs", "obstore")


def s3fs_access() -> tuple[Callable[[], Any], Callable[[int, int], Any]]:
    """How s3fs opens an object for writing, and how it reads a range."""
    import fsspec

    files = fsspec.filesystem("s3", skip_instance_cache=True)
    return (lambda: files.open("s3://mpu/s3fs", "wb", block_size=PART)), lambda start, stop: files.cat_file(
        "s3://mpu/s3fs", start=start, end=stop
    )


def obstore_access() -> tuple[Callable[[], Any], Callable[[int, int], Any]]:
    """The same for obstore."""
    import obstore
    from obstore.store import S3Store

    store = S3Store("mpu", client_options={"allow_http": True})
    return (
        lambda: obstore.open_writer(store, "obstore", buffer_size=PART, max_concurrency=2)
    ), lambda start, stop: obstore.get_range(store, "obstore", start=start, end=stop)


def step(library: str, size: int) -> None:
    """Writes and reads an object with one library; prints what it took."""
    data = memoryview(os.urandom(PART))
    writer, read = {"s3fs": s3fs_access, "obstore": obstore_access}[library]()
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {}
    for what in ("write", "read"):
        before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        if what == "write":
            with writer() as file:
                for start in range(0, size, RANGE):
                    file.write(data[start % PART : start % PART + RANGE])
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                parts = pool.map(lambda start: len(read(start, start + RANGE)), range(0, size, RANGE))
            assert sum(parts) == size
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        result[what] = {"seconds": time.perf_counter() - begin, "cpu": cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**result, "memory_mb": (peak - idle) / 1e3}))


def serve() -> None:
    """Runs moto's server until standard input is closed; prints its URL."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
    sys.stdin.read()
    server.stop()


@contextmanager
def store() -> Iterator[None]:
    """A new server with an empty bucket, in this process's environment."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, __file__, "--serve"], text=True, **pipes) as server:
        url = server.stdout.readline().strip()  # type: ignore[union-attr]
        names = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update({**names, "AWS_ENDPOINT_URL": url})
        import boto3

        boto3.client("s3").create_bucket(Bucket="mpu")
        yield
        server.stdin.close()  # type: ignore[union-attr]


def measured(*arguments: str) -> dict[str, Any]:
    """Runs a step of this file in its own process; returns what it prints."""
    done = subprocess.run(
        [sys.executable, __file__, "--step", *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def one_pass(what: str, state: str) -> None:
    """Runs one pass over the store, in its own process; prints what it took."""
    from mpunlearn.server.postprocess import postprocess
    from mpunlearn.server.preprocess import preprocess

    begin = time.perf_counter()
    if what == "preprocess":
        preprocess("s3://mpu/model", state=state, out="s3://mpu/copies", perturbation=Perturbation(common_noise=0))
    else:
        updates = [f"s3://mpu/update-{copy}" for copy in (1, 2, 3)]
        postprocess(updates, state=state, out="s3://mpu/final")
    seconds, usage = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    written = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["write_bytes"]
    cpu = usage.ru_utime + usage.ru_stime
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_gb": usage.ru_maxrss / 1e6, "written": int(written)}))


def transfer(folder: Path, url: str, upload: bool) -> Path:
    """Uploads a local directory and removes it, or downloads one."""
    from mpunlearn.storage import as_place, pieces

    place = as_place(url, "store")
    for file in (folder if upload else place).iterdir():
        if upload:
            assert isinstance(file, Path)
            with (place / file.name).writing() as target:  # type: ignore[union-attr]
                for piece in pieces(file, 0, file.stat().st_size):
                    target.write(bytes(piece))
        else:
            folder.mkdir(exist_ok=True)
            with (folder / file.name).open("wb") as copy:
                for piece in pieces(file, 0, file.size()):  # type: ignore[union-attr]
                    copy.write(piece)
    if upload:
        shutil.rmtree(folder)
    return folder


def passes(model: str, layers: int | None, folder: Path) -> str:
    """Runs both passes over a model in the store; returns a table."""
    config = {**MODELS[model], **({"num_hidden_layers": layers} if layers else {})}
    rows = []
    with store():
        transfer(build(folder / "model", config), "s3://mpu/model", upload=True)
        for what in ("preprocess", "postprocess"):
            result = measured(what, str(folder / "state"))
            row = (
                f"{result['seconds']:.0f}",
                f"{result['cpu']:.1f}",
                f"{result['peak_gb']:.2f}",
                str(result["written"]),
            )
            rows.append([what, *row])
            if what == "preprocess":
                for copy in (1, 2, 3):
                    local = transfer(folder / "copy", f"s3://mpu/copies/copy-{copy}", upload=False)
                    transfer(synthetic_update(local, folder / "update"), f"s3://mpu/update-{copy}", upload=True)
                    shutil.rmtree(local)
    return markdown(["pass", "seconds", "CPU seconds", "peak memory, GB", "bytes written to the disk"], rows)


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "--step":
        return step(sys.argv[2], int(sys.argv[3])) if sys.argv[2] in LIBRARIES else one_pass(*sys.argv[2:])
    if sys.argv[1:] == ["--serve"]:
        return serve()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--model", choices=MODELS, help="run the passes over this model instead")
    parser.add_argument("--layers", type=int, help="override the number of layers")
    arguments = parser.parse_args()
    if arguments.model:
        with tempfile.TemporaryDirectory() as folder:
            return print(passes(arguments.model, arguments.layers, Path(folder)))
    size = arguments.megabytes * 1_000_000 // RANGE * RANGE
    rows = []
    for library in LIBRARIES:
        with store():
            result = measured(library, str(size))
        gigabytes = size / 1e9
        row = [f"{result[what][unit] / gigabytes:.2f}" for what in ("write", "read") for unit in ("seconds", "cpu")]
        rows.append([library, *row, f"{result['memory_mb']:.0f}"])
    header = ["library", "write, s/GB", "CPU, s/GB", "read, s/GB", "CPU, s/GB", "memory, MB"]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
