"""A folder of shards from a stranger, its digests right: manifest, index, keys, quarantine and shards changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.fuzz.examples import few, many
from tests.fuzz.limited import run_example
from tests.fuzz.mutations import (
    byte_changes,
    change_bytes,
    change_file,
    change_tree,
    chosen,
    file_changes,
    spelled,
    tree_changes,
    write_json,
)

QUARANTINE = {
    "format": "livt-quarantine",
    "version": 1,
    "samples": [{"number": 1, "key": "raw-000001", "shard": "set-000000.tar", "class": 0, "reason": "it is cut"}],
}
COMMANDS = (
    ("shards", "info", "set"),
    ("shards", "verify", "set", "--workers", "1"),
    ("shards", "verify", "set", "--decode", "--quarantine", "--workers", "1"),
    ("shards", "trace", "tiny.yaml", "--world-size", "1", "--rank", "0", "--epoch", "0"),
)
RECIPE = """\
name: t
data: {train: set, mean: [0.5], std: [0.5], workers: 0}
model: {size: vit_micro, image_px: 28, channels: 1}
stages: {finetune: {init: scratch, epochs: 1, warmup_epochs: 0, global_batch: 2, micro_batch: 2}}
"""

cases = st.fixed_dictionaries(
    {
        "manifest": st.one_of(st.just([]), tree_changes),
        "bytes": st.dictionaries(
            chosen(["index.npy", "keys.bin", "shard", "quarantine.json", "manifest.json"]),
            byte_changes,
            max_size=2,
        ),
        "quarantine": st.one_of(st.none(), st.just([]), tree_changes),
        "sealed": chosen([True, True, True, False]),  # sizes and hashes are those of the changed files
        "file": st.one_of(st.none(), st.none(), file_changes),
        "command": chosen(COMMANDS),
    }
)


def write(folder: Path, case: dict) -> None:
    """FOLDER/set, changed as `case` says."""
    there = folder / "set"
    for name, changes in case["bytes"].items():
        path = next(iter(sorted(there.glob("*.tar")))) if name == "shard" else there / name
        if path.is_file() and name != "manifest.json":
            path.write_bytes(change_bytes(path.read_bytes(), changes))
    if case["quarantine"] is not None:
        write_json(there / "quarantine.json", change_tree(QUARANTINE, case["quarantine"]))
    body = json.loads((there / "manifest.json").read_bytes())
    body.pop("digest")
    if case["sealed"]:
        for info in (*body["shards"], body["index"], body["keys"]):
            raw = (there / info["name"]).read_bytes()
            info.update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    body = change_tree(body, case["manifest"])
    if isinstance(body, dict):
        body["digest"] = hashlib.sha256(spelled(body)).hexdigest()
    write_json(there / "manifest.json", body)
    if "manifest.json" in case["bytes"]:
        raw = (there / "manifest.json").read_bytes()
        (there / "manifest.json").write_bytes(change_bytes(raw, case["bytes"]["manifest.json"]))
    if case["file"]:
        change_file(there, case["file"])
    (folder / "tiny.yaml").write_text(RECIPE)


def check(base: Path, shards: Path, case: dict) -> None:
    run_example(base, shards, write, case)


UNCHANGED: dict[str, Any] = {"manifest": [], "bytes": {}, "quarantine": None, "sealed": True, "file": None}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_each_command_succeeds_on_an_unchanged_set(base: Path, shards: Path, command: tuple[str, ...]) -> None:
    assert run_example(base, shards, write, {**UNCHANGED, "command": command}).code == 0


SEEDS = [  # each byte of a shard of 64 GiB was hashed, although the manifest has another size
    {**UNCHANGED, "file": ("huge", 0.0), "command": COMMANDS[1]},
    {**UNCHANGED, "quarantine": [], "file": ("zeros", 0.73), "command": COMMANDS[2]},  # removes a link, not its target
    {
        **UNCHANGED,
        "file": ("huge", 0.0),
        "bytes": {"index.npy": [("flip", 0.9, 1)]},
        "sealed": False,
        "command": COMMANDS[1],
    },
]

test_manifests = few(cases, check, seeds=SEEDS)
test_many_manifests = many(cases, check)
