"""Recipes from strangers: `livt recipe check` and `show` of a recipe, the recipes that it extends, and `--set`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.fuzz.examples import few, many
from tests.fuzz.limited import Outcome, example, livt
from tests.fuzz.mutations import (
    EVIL,
    as_json,
    byte_changes,
    change_bytes,
    change_file,
    change_tree,
    chosen,
    file_changes,
    tree_changes,
)

RECIPE = {
    "extends": ["base.yaml", "other.yaml"],
    "name": "mine",
    "seed": 7,
    "data": {"train": "sh/train", "val": "sh/val", "mean": [0.5], "std": [0.5], "workers": 0},
    "model": {"size": "vit_micro", "image_px": 28, "channels": 1, "decoder": {"width": 32, "depth": 1, "heads": 2}},
    "stages": {
        "pretrain": {"epochs": 2, "warmup_epochs": 1, "global_batch": 16, "micro_batch": 16, "crop_scale": [0.2, 1.0]},
        "finetune": {
            "epochs": 2,
            "warmup_epochs": 1,
            "global_batch": 16,
            "micro_batch": 16,
            "loss": {"name": "bal_bce"},
        },
    },
}
BASE = "seed: 3\nstages: &s\n  finetune: {epochs: 5, layer_decay: 0.75}\nparallel: {strategy: auto}\n"
OTHER = "extends: base.yaml\ndata: {train: t}\nlog: {every_steps: 7}\n"
PIECES = [
    "&a [*a]", "*nothing", "!!python/object/apply:os.system [id]", "!!binary aGk=", "<<: *s", "? [1, 2]\n: 3",
    "\t- x", "---",
    "%YAML 3.0", "{" * 300, "[" * 30_000, "- " * 5000, "'", '"\\ud800"', '"\\0"', "|\n  x", "a: " * 40, "# \x85",
    "9" * 5000,
    "x: " + "y " * 50_000, "{" + ", ".join(f"k{n}: 1" for n in range(3000)) + "}", "extends: livt:nothing",
    "extends: mine.yaml",
    "&a a: &b {c: *a}", "!<tag:yaml.org,2002:int> x", "0x_1", "12:30:45", "\u2028", "@x", "`x`",
]  # fmt: skip
SETS = [
    "run_dir=/", "seed=[[[", "a" * 3000 + "=1", ".".join("a" * 3000) + "=1", "=", "stages.*.epochs=-1", "data.train=",
    "model.size={}", f"name={EVIL}", "stages.finetune.loss=null", "stages=null", "extends=/etc/passwd",
    "seed=" + "9" * 5000,
    "data.mean=[1, 2", "model.depth=1000000000", "stages.finetune.global_batch=99999999999999999999", "log=&a [*a]",
]  # fmt: skip
recipes = st.fixed_dictionaries(
    {
        "tree": st.one_of(st.just([]), tree_changes),
        "bytes": st.one_of(st.just([]), st.just([]), byte_changes),
        "piece": st.one_of(st.none(), st.tuples(chosen(PIECES), st.floats(0, 1))),
        "base": st.one_of(st.just([]), byte_changes),
        "file": st.one_of(st.none(), st.none(), file_changes),
        "sets": st.lists(st.one_of(chosen(SETS), st.text(alphabet=st.characters(exclude_characters="\0"))), max_size=2),
        "command": chosen(["check", "check", "show"]),
    }
)


def write(folder: Path, case: dict) -> None:
    text = as_json(change_tree(RECIPE, case["tree"]), indent=1)
    if case["piece"]:
        lines = text.split("\n")
        at = int(case["piece"][1] * len(lines))
        text = "\n".join([*lines[:at], case["piece"][0], *lines[at:]])
    data = text.encode("utf-8", "surrogatepass")
    (folder / "mine.yaml").write_bytes(change_bytes(data, case["bytes"]))
    (folder / "base.yaml").write_bytes(change_bytes(BASE.encode(), case["base"]))
    (folder / "other.yaml").write_text(OTHER)
    if case["file"]:
        change_file(folder, case["file"])


def run_case(base: Path, case: dict) -> Outcome:
    with example(base) as folder:
        write(folder, case)
        sets = [word for text in case["sets"] for word in ("--set", text.encode("utf-8", "replace").decode())]
        return livt("recipe", case["command"], "mine.yaml", *sets, cwd=folder)


def check(base: Path, case: dict) -> None:
    run_case(base, case)


NOTHING: dict[str, Any] = {
    "tree": [],
    "bytes": [],
    "piece": None,
    "base": [],
    "file": None,
    "sets": [],
    "command": "check",
}
LINK_TO_ITSELF = {**NOTHING, "file": ("itself", 0.0)}  # base.yaml


@pytest.mark.parametrize("command", ["check", "show"])
def test_each_command_accepts_the_recipe_without_changes(base: Path, command: str) -> None:
    assert run_case(base, {**NOTHING, "command": command}).code == 0


test_recipes = few(recipes, check, seeds=[LINK_TO_ITSELF])
test_many_recipes = many(recipes, check)
