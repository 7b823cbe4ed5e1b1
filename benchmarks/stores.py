"""Compares two libraries for object stores, s3fs and obstore, as the server's passes use one: parts and ranges.

A server of the moto package, in a process of its own, plays S3. Each library, also in its own process, writes an object in
parts and reads it back in ranges on as many threads as the passes use. The server is slow, so the seconds say little; the
processor time of the client and its memory are what the passes have to share with it.

    python benchmarks/stores.py [--megabytes 1024]        # needs boto3, moto[server], s3fs and obstore
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mpunlearn.server.stream import THREADS
from mpunlearn.tables import markdown

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


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "--step":
        return step(sys.argv[2], int(sys.argv[3]))
    if sys.argv[1:] == ["--serve"]:
        return serve()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024)
    size = parser.parse_args().megabytes * 1_000_000 // RANGE * RANGE
    rows = []
    for library in LIBRARIES:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([sys.executable, __file__, "--serve"], text=True, **pipes) as server:
            url = server.stdout.readline().strip()  # type: ignore[union-attr]
            environment = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
            environment |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": url}
            os.environ.update(environment)
            import boto3

            boto3.client("s3").create_bucket(Bucket="mpu")
            command = [sys.executable, __file__, "--step", library, str(size)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            server.stdin.close()  # type: ignore[union-attr]
        result = json.loads(done.stdout.splitlines()[-1])
        gigabytes = size / 1e9
        row = [f"{result[what][unit] / gigabytes:.2f}" for what in ("write", "read") for unit in ("seconds", "cpu")]
        rows.append([library, *row, f"{result['memory_mb']:.0f}"])
    header = ["library", "write, s/GB", "CPU, s/GB", "read, s/GB", "CPU, s/GB", "memory, MB"]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
