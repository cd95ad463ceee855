"""torch's record of the last collectives of this rank, written to a file when the rank is ended.

    start_dump(Path("stacks/collectives-3.json")).join(8)    {"nccl": {…}, "gloo": {…}}

torch has two recorders: NCCL's, and one of gloo's collectives. Both record if TORCH_FR_BUFFER_SIZE is set before the
process group is made (torch 2.8 or newer). JSON, because torch's other format is a pickle; it has no stacks, which
`stacks/rank-3.txt` has of the collective that waits.
"""

from __future__ import annotations

import json
import threading
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

SIZE = "TORCH_FR_BUFFER_SIZE"
OLD_SIZE = "TORCH_NCCL_TRACE_BUFFER_SIZE"  # its name before, which torch reads still
ENTRIES = 2000  # collectives: some tens of steps
DUMPS = {"nccl": "_dump_nccl_trace_json", "gloo": "_dump_fr_trace_json"}


def set_size(environ: MutableMapping[str, str]) -> None:
    """Have torch record the last ENTRIES collectives, unless the user has set a number."""
    if OLD_SIZE not in environ:
        environ.setdefault(SIZE, str(ENTRIES))


def start_dump(path: Path) -> threading.Thread:
    """Write what is recorded to `path`, in a thread: NCCL's recorder asks a device that may not answer."""
    thread = threading.Thread(target=_dump, args=(path,), name="flight recorder", daemon=True)
    thread.start()
    return thread


def _dump(path: Path) -> None:
    from torch._C import _distributed_c10d

    recorded: dict[str, Any] = {}
    for backend, dump in DUMPS.items():
        with suppress(AttributeError, RuntimeError, ValueError):
            content = json.loads(getattr(_distributed_c10d, dump)())
            if content.get("entries"):
                recorded[backend] = content
    if recorded:
        with suppress(OSError):
            path.write_text(json.dumps(recorded, indent=1), encoding="utf-8")
