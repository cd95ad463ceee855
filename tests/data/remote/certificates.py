"""Certificates for servers on 127.0.0.1, made by the `openssl` command: nobody's authority signed them."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Certificate:
    certificate: Path
    key: Path


def self_signed(folder: Path, name: str = "IP:127.0.0.1") -> Certificate:
    """For the host `name`, valid for two days. Skips where `openssl` is not installed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed (apt-get install openssl)")
    folder.mkdir(parents=True, exist_ok=True)
    made = Certificate(folder / "certificate.pem", folder / "key.pem")
    words = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    words += ["-subj", "/CN=a test", "-addext", f"subjectAltName={name}", "-keyout", made.key, "-out", made.certificate]
    subprocess.run(["openssl", "req", *map(str, words)], check=True, capture_output=True)
    return made
