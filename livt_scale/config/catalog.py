"""The recipes that ship, as a table: what `livt recipe list` prints, and docs/recipes.md.

A recipe opens with what it reproduces, on what hardware, the number to expect, and the command; those lines are read
here, and the rest is taken from the recipe as it resolves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Recipe, Stage
from livt_scale.util.errors import UsageError
from livt_scale.util.resources import PREFIX, shipped

HEAD = re.compile(r"^# (Reproduces|Hardware|Expect|Command|Note):\s*(.*)$")  # a note is not in the table
MARK = b"made by `livt recipe list"  # in every page
PAGE = """\
# Recipes

This page lists the recipes that ship. It is made by `livt recipe list --page docs/recipes.md`;
[recipe files](recipe-files.md) shows how to write and change one.

A comment names the source of each value that is not the paper's. `_code` recipes have the values of the public code and
logs, if these differ from the paper's table: their learning rate follows the six public logs in every epoch
(`tests/test_schedules.py`). To change the model, the schedule or the loss, use `--set`:

```sh
livt recipe show recipes/imagenet_lt/vit_b16.yaml --set stages.pretrain.epochs=400 --set model.size=vit_s
```
"""


@dataclass(frozen=True)
class Row:
    """One recipe: its path below recipes/, its head, and its resolved values."""

    path: str
    reproduces: str
    hardware: str
    expect: str
    command: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """`livt:imagenet_lt/vit_b16`: what the command line takes anywhere."""
        return PREFIX + self.path.removesuffix(".yaml")

    @property
    def model(self) -> str:
        model = self.recipe.model
        return f"{model.size}/{model.dims.patch_px}" if model.is_vit else model.name

    def stage(self, name: Stage) -> str:
        """ "800 × 4096 at 224 px", for fine-tuning with the loss and what is trained; "-" without the stage."""
        if name not in self.recipe.stage_names:
            return "-"
        part = self.recipe.stage(name)
        px = self.recipe.at(name).model.image_px
        loss = (
            f", {self.recipe.stages.finetune.loss.name}" if name == "finetune" and self.recipe.stages.finetune else ""
        )
        trained = f", {part.tuning.phrase}" if part.tuning.freezes else ""
        return f"{part.epochs} × {part.global_batch} at {px} px{loss}{trained}"


def rows(folder: Path | None = None) -> list[Row]:
    """Every recipe below `folder`, or that ships, except those in base/. Raises UsageError: one has no head."""
    folder = folder or shipped("recipes")
    paths = sorted(path for path in folder.rglob("*.yaml") if "base" not in path.relative_to(folder).parts)
    return [_row(path, folder) for path in paths]


def _row(path: Path, folder: Path) -> Row:
    said: dict[str, str] = {}
    name = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if match := HEAD.match(line):
            name = match[1]
            said[name] = match[2].strip()
        elif name:
            said[name] += " " + line.lstrip("# ").strip()
    missing = [word for word in ("Reproduces", "Hardware", "Expect", "Command") if word not in said]
    if missing:
        raise UsageError(f"{path} does not open with {', '.join(missing)}", remedy="see the head of the others")
    told = {word.lower(): said[word] for word in ("Reproduces", "Hardware", "Expect", "Command")}
    return Row(str(path.relative_to(folder)), **told, recipe=load_recipe(path))


def page(found: Sequence[Row]) -> str:
    """docs/recipes.md: a table for each folder of recipes."""
    parts = [PAGE]
    for group in dict.fromkeys(row.path.split("/")[0] for row in found):
        parts += [f"## {group}", ""]
        parts += ["| recipe | model | pretraining | fine-tuning | reproduces | expect |"]
        parts += ["| --- | --- | --- | --- | --- | --- |"]
        for row in (row for row in found if row.path.startswith(f"{group}/")):
            stages = f"{row.stage('pretrain')} | {row.stage('finetune')}"
            link = f"[{row.path.split('/')[1]}](../recipes/{row.path})"
            cells = [link, row.model, stages, row.reproduces, row.expect]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)
