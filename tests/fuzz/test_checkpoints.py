"""A run's checkpoint from a stranger, its hashes right: manifest, DCP's pickle and pieces, and the run's own files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.fuzz.examples import few, many
from tests.fuzz.limited import run_example
from tests.fuzz.mutations import (
    as_json,
    byte_changes,
    change_bytes,
    change_file,
    change_tree,
    chosen,
    file_changes,
    fractions,
    odd_values,
    tree_changes,
    write_json,
)
from tests.fuzz.pickles import SNIPPETS, changed_pickle

STEP = Path("run/finetune/checkpoints/step-00000040")
STATUS = {
    "state": "running", "stage": "finetune", "since": "2026-01-31T12:00:00+00:00", "at": "2026-01-31T12:00:00+00:00",
    "step": 4,
    "total_steps": 80, "host": "node", "pid": 4711, "starts": 2, "history": [{"state": "failed", "why": "x"}],
    "ranks": {"0": 1},
}  # fmt: skip
LINE = {"step": 4, "epoch": 0.2, "loss": 1.0, "lr": 0.1, "images_per_s": 5.0, "step_s": 0.1, "data_wait_s": 0.0}
COMMANDS = (
    ("ckpt", "ls", "run"),
    ("ckpt", "ls", "run", "--json"),
    ("ckpt", "verify", str(STEP)),
    ("ckpt", "convert", str(STEP), "--to", "out.safetensors"),
    ("ckpt", "convert", str(STEP), "--to", "out.safetensors"),
    ("status", "run"),
    ("status", "run", "--json"),
    ("export", "run", "--out", "out"),
)
cases = st.fixed_dictionaries(
    {
        "manifest": st.one_of(st.just([]), tree_changes),
        "bytes": st.dictionaries(chosen([".metadata", "__0_0.distcp", "manifest.json"]), byte_changes, max_size=2),
        "snippets": st.lists(st.tuples(fractions, chosen(SNIPPETS)), max_size=1),
        "foreign": chosen([False, False, False, True]),  # without our manifest: a folder of DCP
        "status": st.one_of(st.none(), tree_changes),
        "line": st.one_of(st.none(), tree_changes),
        "chain": st.one_of(st.none(), odd_values),
        "recipe": st.one_of(st.just([]), st.just([]), byte_changes),
        "file": st.one_of(st.none(), st.none(), file_changes),
        "command": chosen(COMMANDS),
    }
)


def write(folder: Path, case: dict) -> None:
    there, run = folder / STEP, folder / "run"
    metadata = there / ".metadata"
    metadata.write_bytes(changed_pickle(metadata.read_bytes(), {"snippets": case["snippets"], "pickle": []}))
    for name, changes in case["bytes"].items():
        if name != "manifest.json":
            (there / name).write_bytes(change_bytes((there / name).read_bytes(), changes))
    body = json.loads((there / "manifest.json").read_bytes())
    for entry in body["files"]:
        raw = (there / entry["name"]).read_bytes()
        entry.update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    write_json(there / "manifest.json", sealed(change_tree(body, case["manifest"])))
    if "manifest.json" in case["bytes"]:
        raw = (there / "manifest.json").read_bytes()
        (there / "manifest.json").write_bytes(change_bytes(raw, case["bytes"]["manifest.json"]))
    if case["foreign"]:
        (there / "manifest.json").unlink()
    if case["status"] is not None:
        write_json(run / "finetune" / "status.json", change_tree(STATUS, case["status"]))
    if case["line"] is not None:
        lines = [json.dumps(LINE), as_json(change_tree(LINE, case["line"])), json.dumps(LINE)]
        (run / "finetune" / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="replace")
    if case["chain"] is not None:
        (run / "slurm").mkdir(exist_ok=True)
        write_json(run / "slurm" / "chain.json", {"chain": "x", "jobs": case["chain"]})
    (run / "recipe.yaml").write_bytes(change_bytes((run / "recipe.yaml").read_bytes(), case["recipe"]))
    if case["file"]:
        change_file(run, case["file"])


def sealed(body: object) -> object:
    """With the SHA-256 that the manifest has of itself."""
    if not isinstance(body, dict):
        return body
    rest = {key: value for key, value in body.items() if key != "sha256"}
    try:
        text = as_json({"sha256": "", **rest}, indent=1, allow_nan=False) + "\n"
    except ValueError:
        return body
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), **rest}


def check(base: Path, run: Path, case: dict) -> None:
    run_example(base, run, write, case)


UNCHANGED = {
    "manifest": [], "bytes": {}, "snippets": [], "foreign": False, "status": None, "line": None, "chain": None,
    "recipe": [], "file": None, "command": ("status", "run"),
}  # fmt: skip
SEEDS = [{**UNCHANGED, "chain": jobs} for jobs in (5, None, "x", [1], {"a": {}})]  # a traceback of `livt status`


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS), ids=" ".join)
def test_each_command_succeeds_on_an_unchanged_run(base: Path, run: Path, command: tuple[str, ...]) -> None:
    assert run_example(base, run, write, {**UNCHANGED, "command": command}).code == 0


test_checkpoints = few(cases, check, seeds=SEEDS)
test_many_checkpoints = many(cases, check)
