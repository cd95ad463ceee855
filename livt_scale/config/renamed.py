"""Recipe fields that were renamed or removed: the error for an old name, and the translation of a saved recipe.

In a recipe or a `--set`, an old name is an unknown field, and the error gives the new one. A recipe that a run saved
(RUN/recipe.yaml, the facts of a checkpoint) is translated by the same tables, so that the run can still be resumed,
evaluated and exported:

    translate({"faults": {"hang_s": 60}})  ->  {"faults": {"stall_timeout_s": 60}}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# old path -> new path; a part that moves takes its fields along
RENAMED = {
    "faults.hang_s": "faults.stall_timeout_s",
    "slurm.lead_s": "slurm.signal_lead_s",
    "slurm.most_idle_restarts": "slurm.max_restarts_without_progress",
}


@dataclass(frozen=True)
class Removed:
    """A field that is gone. A saved recipe may still hold it with the value `default`, which had no effect."""

    default: Any
    reason: str  # ends the sentence "data.decode was removed: …"


REMOVED = {
    "data.decode": Removed(default="cpu", reason="images are decoded on the CPU"),
    "parallel.offload_dir": Removed(default=None, reason="states are offloaded to the host's memory, never to a disk"),
}

_MISSING = object()


def hint(path: str) -> str | None:
    """The hint for the field `path`; None: it never existed."""
    if path in RENAMED:
        return f"it is now called {RENAMED[path]}"
    return f"it was removed: {REMOVED[path].reason}" if path in REMOVED else None


def translate(saved: dict[str, Any]) -> dict[str, Any]:
    """A copy of a saved recipe with today's names, without removed fields that had no effect.

    A removed field with another value stays, so that the check of the recipe refuses it by name.
    """
    values = _copy(saved)
    for old, new in RENAMED.items():
        value = _take(values, old)
        if value is not _MISSING:
            _put(values, new, value)
    for path, removed in REMOVED.items():
        value = _take(values, path)
        if value is not _MISSING and value != removed.default:
            _put(values, path, value)
    return values


def _copy(value: Any) -> Any:
    return {key: _copy(child) for key, child in value.items()} if isinstance(value, dict) else value


def _take(values: dict[str, Any], path: str) -> Any:
    """Remove the value at `path` and return it."""
    *parts, name = path.split(".")
    node: Any = values
    for part in parts:
        node = node.get(part) if isinstance(node, dict) else None
    return node.pop(name, _MISSING) if isinstance(node, dict) else _MISSING


def _put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set `path`, unless the part around it is missing or the field is already set."""
    *parts, name = path.split(".")
    node: Any = values
    for part in parts:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            return
    node.setdefault(name, value)
