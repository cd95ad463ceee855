"""Reads any safetensors file: its tensors by name, and the text in its metadata.

The library maps the file and checks that the tensors neither overlap nor leave a gap. Here its header is bounded first
(it is JSON, a hundred bytes for a tensor), and whatever the library raises becomes one kind of error.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from livt_scale.util.outside import Kind, open_checked
from livt_scale.util.text import first_line

MAX_HEADER_BYTES = 2**25  # 300,000 tensors, or the names of a million classes


def read_safetensors(path: Path, kind: Kind = "weights") -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, metadata). Raises OSError, and ValueError where it is not a file of tensors."""
    with open_checked(path, kind) as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"its header would have {header_bytes:,} bytes, more than {MAX_HEADER_BYTES:,}")
        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
                return tensors, opened.metadata() or {}
        except Exception as error:  # SafetensorError; KeyError and others for a type that torch has not
            raise ValueError(first_line(error)) from error
