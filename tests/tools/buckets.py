"""An S3 server for tests, and how it is reached."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.tools.waiting import until


@contextmanager
def serving() -> Iterator[str]:
    """Run an S3 server with a bucket called `bucket`, in a process of its own; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        address = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            with suppress(urllib.error.URLError):
                urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT")).close()
                return True
            return False

        try:
            until(answers, "the server answers")
            yield address
        finally:
            process.kill()


def settings(address: str) -> dict[str, str]:
    """Return the environment in which `s3://` is this server."""
    own = {"ENDPOINT_URL": address, "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "REGION": "us-east-1"}
    return {f"AWS_{name}": value for name, value in {**own, "ALLOW_HTTP": "true"}.items()}
