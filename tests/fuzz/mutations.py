"""Strategies that take what is valid and change it: trees of plain values, bytes, and the files of a folder.

A mutation is drawn as plain data (kind, numbers between 0 and 1 that choose a place) and applied to whatever it meets,
so hypothesis can shrink it without knowing the format.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

EVIL = "a\n\x1b[2J\x07livt: error: x\u202e"
ODD_TEXT = [
    "",
    " ",
    EVIL,
    "../../etc/passwd",
    "/dev/zero",
    "a" * 20_000,
    "\ufeffname",
    "1e999",
    "[bold]x[/]",
    "-1",
    "null",
]
ODD = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, 1e300, -0.0,
    *ODD_TEXT, [], {}, [[]], [None] * 2000, {"a": {}}, {"": None}, ["x", 1, None],
]  # fmt: skip


@dataclass(frozen=True)
class Nested:
    """Lists in each other; in JSON alone, for copying and printing so many would exceed Python's recursion limit."""

    depth: int


def chosen(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One of `values`; unlike st.sampled_from it does not spell them out, which hypothesis warns of."""
    return st.integers(0, len(values) - 1).map(lambda k: values[k])


fractions = st.floats(0, 1, exclude_max=True)
odd_values = st.one_of(
    chosen(ODD),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.integers(2, 2000).map(lambda depth: Nested(depth)),
)
tree_changes = st.lists(
    st.tuples(chosen(["put", "put", "put", "drop", "rename", "add", "repeat", "swap"]), fractions, odd_values),
    min_size=1,
    max_size=4,
)
byte_changes = st.lists(
    st.tuples(
        chosen(["flip", "flip", "set", "cut", "grow", "repeat", "zero", "number"]),
        fractions,
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)
file_changes = st.tuples(
    chosen(["pipe", "folder", "zeros", "nowhere", "itself", "empty", "gone", "huge", "socket", "unreadable"]),
    fractions,
)


def change_tree(tree: Any, changes: list[tuple[str, float, Any]]) -> Any:
    """A copy of `tree`, dicts and lists in each other, with `changes`."""
    tree = deepcopy(tree)
    for kind, where, drawn in changes:
        value = deepcopy(drawn)  # later changes are for the tree, not for ODD
        places = list(_places(tree))
        if not places:
            return value
        parent, key = places[int(where * len(places))]
        if kind == "put":
            parent[key] = value
        elif kind == "drop":
            del parent[key]
        elif kind == "swap":
            other, other_key = places[int(where * 7919) % len(places)]
            parent[key], other[other_key] = deepcopy(other[other_key]), deepcopy(parent[key])
        elif isinstance(parent, dict):
            name = value if isinstance(value, str) else EVIL
            parent[name] = parent.pop(key) if kind == "rename" else value if kind == "add" else deepcopy(parent[key])
        else:
            parent.insert(key, deepcopy(parent[key]) if kind == "repeat" else value)
    return tree


def as_json(tree: Any, *, indent: int | None = None, allow_nan: bool = True) -> str:
    """What json.dumps returns, with the lists that a `Nested` stands for."""
    text = json.dumps(tree, indent=indent, allow_nan=allow_nan, default=lambda nested: f"nested {nested.depth} times")
    return re.sub('"nested ([0-9]+) times"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), text)


def _places(tree: Any) -> Any:
    """(parent, key) of everything in it."""
    left = [tree]
    while left:
        parent = left.pop()
        items = parent.items() if isinstance(parent, dict) else enumerate(parent) if isinstance(parent, list) else ()
        for key, child in list(items):
            yield parent, key
            left.append(child)


def change_bytes(data: bytes, changes: list[tuple[str, float, int]]) -> bytes:
    raw = bytearray(data)
    for kind, where, value in changes:
        at = int(where * len(raw))
        if kind == "cut":
            del raw[at:]
        elif kind == "grow":
            raw[at:at] = bytes([value]) * (1 + value * 16)
        elif kind == "repeat":
            raw[at:at] = raw[at : at + 1 + value * 16]
        elif kind == "zero":
            raw[at : at + value] = bytes(len(raw[at : at + value]))
        elif kind == "number" and len(raw) >= 8:  # a length, a size, an offset
            at = min(at, len(raw) - 8)
            raw[at : at + 8] = [2**63, 2**31, 2**60, 2**32 - 1, 10**12, 1][value % 6].to_bytes(8, "little")
        elif at < len(raw):
            raw[at] = raw[at] ^ (1 << value % 8) if kind == "flip" else value
    return bytes(raw)


def change_file(folder: Path, change: tuple[str, float]) -> None:
    """Put something else in the place of one of the files below `folder`."""
    kind, where = change
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if not paths:
        return
    path = paths[math.floor(where * len(paths))]
    size = path.stat().st_size
    if kind == "unreadable":
        path.chmod(0)  # of no effect for root
        return
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("zeros", "nowhere", "itself"):
        path.symlink_to({"zeros": "/dev/zero", "nowhere": "no such file", "itself": path.name}[kind])
    elif kind == "empty":
        path.touch()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(max(size, 2**36))
    elif kind == "socket":
        os.mknod(path, 0o140600)


def spelled(body: object) -> bytes:
    return (as_json(body, indent=1) + "\n").encode()


def write_json(path: Path, body: object) -> None:
    path.write_bytes(spelled(body))
