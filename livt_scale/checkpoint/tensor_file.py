"""Tensors written as one file, of safetensors or of torch.save: the same tensors and metadata give the same bytes.

    write_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt", "source": "…"})
    write_torch({"model": tensors}, folder / "checkpoint.pth")

safetensors writes the metadata in an order that differs from process to process. So the header is put in order after
the file was written: its length stays, for the tensors' offsets count from its end.

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
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from livt_scale.checkpoint.io import HashedFile

LENGTH_BYTES = 8  # of the header's length, little-endian, at the start of the file
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write contiguous `tensors` to `path`. Raises OSError."""
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
    if len(metadata) > 1:
        _sort_metadata(path)


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
