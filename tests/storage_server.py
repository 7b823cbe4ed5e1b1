"""An S3 server of the moto package, in a process of its own."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SERVE = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(port=0, verbose=False)
server.start()
print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
sys.stdin.read()
server.stop()
"""


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Yields the environment in which a client finds a new server with an empty bucket `mpu`."""
    import boto3

    command = [sys.executable, "-c", SERVE]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as server:
        url = server.stdout.readline().strip().replace("0.0.0.0", "127.0.0.1")
        environment = {
            "AWS_ACCESS_KEY_ID": "server",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url,
        }
        client = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id="server",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="mpu")
        try:
            yield environment
        finally:
            server.stdin.close()
