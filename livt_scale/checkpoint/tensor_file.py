"""Tensors in one file, of safetensors or of torch.save: the same tensors and metadata give the same bytes.

    write_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt", "source": "…"})
    write_torch({"model": tensors}, folder / "checkpoint.pth")
    read_safetensors(path)         # any such file; those of torch.save: `checkpoint.foreign.pickles`

safetensors writes the metadata in an order that differs from process to process. So the header is put in order after
the file was written: its length stays, for the tensors' offsets count from its end.

To read, the library maps the file and checks that the tensors neither overlap nor leave a gap. Here its header is
bounded first (it is JSON, a hundred bytes for a tensor), and whatever the library raises becomes one kind of error.

Errors of the disk are OSError, as from any other file, so that a full disk is one line that says so: safetensors and
torch's zip writer hide them behind other errors.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from livt_scale.checkpoint.io import HashedFile
from livt_scale.util.outside import Kind, open_checked
from livt_scale.util.text import first_line

MAX_HEADER_BYTES = 2**25  # 300,000 tensors, or the names of a million classes
LENGTH_BYTES = 8  # of the header's length, little-endian, at the start of the file
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write contiguous `tensors` to `path`; of those that share memory, each is written. Raises OSError."""
    try:
        save_file(_apart(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
    if len(metadata) > 1:
        _sort_metadata(path)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, each that overlaps another one in memory as a copy: safetensors refuses tied weights."""
    apart, end = dict(tensors), 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if tensor.nbytes and tensor.data_ptr() < end:
            apart[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return apart


def write_torch(tree: Mapping[str, Any], path: Path) -> None:
    """Write `tree` by torch.save to the new file `path`. Raises OSError."""
    file = HashedFile(path)
    try:
        torch.save(tree, file)  # type: ignore[arg-type]
        file.flush()
    except RuntimeError as error:
        raise file.error or error from error
    finally:
        file.close()


def _sort_metadata(path: Path) -> None:
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(ordered) <= length, f"{path}: the header would grow from {length} to {len(ordered)} bytes"
        file.seek(LENGTH_BYTES)
        file.write(ordered.ljust(length))


def read_safetensors(path: Path, kind: Kind = "weights") -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, metadata). Raises OSError, and ValueError where it is not a file of tensors."""
    with open_checked(path, kind) as file:
        header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"its header would have {header_bytes:,} bytes, more than {MAX_HEADER_BYTES:,}")
        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
                return tensors, opened.metadata() or {}
        except Exception as error:  # SafetensorError; KeyError and others for a type that torch has not
            raise ValueError(first_line(error)) from error
