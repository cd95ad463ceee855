"""nginx and an S3 endpoint on 127.0.0.1, as other people wrote them, in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.data.remote.certificates import Certificate

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log {folder}/access.log; limit_rate 4m; keepalive_timeout 0;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{ listen 127.0.0.1:{port}; root "{root}"; }}
}}
"""
AWS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "s3cr3t-of-the-test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "livt"


@contextmanager
def nginx(folder: Path, root: Path) -> Iterator[int]:
    """nginx serving `root`; yields its port. Skips where it is not installed."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed (apt-get install nginx-light)")
    folder.mkdir()
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, root=root, port=port))
    with _running([program, "-c", str(config), "-p", str(folder), "-e", str(folder / "error.log")], port):
        yield port


@contextmanager
def s3(folder: Path, *, certificate: Certificate | None = None) -> Iterator[int]:
    """moto's S3 server, over TLS with a certificate; yields its port. Skips where it, or s3fs, is not installed."""
    for package in ("moto", "s3fs", "flask"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (pip install s3fs 'moto[server]')")
    port = free_port()
    words = ["-c", str(certificate.certificate), "-k", str(certificate.key)] if certificate else []
    with _running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port), *words], port, cwd=folder):
        yield port


def upload(folder: Path, port: int, prefix: str) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1")  # fmt: skip  # noqa: E501
    client.create_bucket(Bucket=BUCKET)
    for path in folder.iterdir():
        client.upload_file(str(path), BUCKET, f"{prefix}/{path.name}")
    client.close()


@contextmanager
def _running(command: list[str], port: int, *, cwd: Path | None = None) -> Iterator[None]:
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=cwd, env=environment)
    try:
        for _ in range(3000):
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
