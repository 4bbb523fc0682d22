"""Places to write to that are no ordinary disk: an S3 server, and a disk that is soon full."""

import contextlib
import os
import socket
import subprocess

import pyarrow.fs
import pytest
from moto.server import ThreadedMotoServer


@contextlib.contextmanager
def bucket(name):
    """The URI of a folder in a bucket of a local S3 server, as `{}` between two halves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    filesystem, _ = pyarrow.fs.FileSystem.from_uri(
        f"s3://{name}?{options}&allow_bucket_creation=true"
    )
    filesystem.create_dir(name)
    try:
        yield f"s3://{name}/{{}}?{options}"
    finally:
        server.stop()


@contextlib.contextmanager
def small_disk(folder, megabytes):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("only root may make a small disk to fill")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
