"""Two revisions, one recipe: are their losses equal bit for bit? `make compare A=main B=.`

A revision is what git can name; `.` is the working tree. Each is checked out beside the others (git worktree), trains
the same recipe on the same shards for a few epochs, one after the other, and the losses in metrics.jsonl are compared
number by number. Exit code 0: equal; 1: they differ, and the table says where first and by how much; 2: wrong usage.
A refactoring ends with 0; a change of the numbers goes into the commit's line `Numbers:`.

    python scripts/compare.py main . --epochs 2 --set seed=1
    python scripts/compare.py main . --processes 2 --set parallel.strategy=fsdp
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Losses = dict[tuple[str, int], float]  # (stage, step) -> loss


@dataclass(frozen=True)
class Difference:
    """One step on which the revisions disagree; None where one of them has no such line."""

    stage: str
    step: int
    a: float | None
    b: float | None

    @property
    def relative(self) -> float:
        if self.a is None or self.b is None or self.a != self.a or self.b != self.b:
            return float("inf")
        return abs(self.a - self.b) / max(abs(self.a), abs(self.b))


def differences(a: Losses, b: Losses) -> list[Difference]:
    """Where `a` and `b` are not the same number, in the order of stages and steps; NaN equals NaN."""
    order = list(dict.fromkeys([*a, *b]))
    return [Difference(*key, a.get(key), b.get(key)) for key in order if repr(a.get(key)) != repr(b.get(key))]


def table(found: list[Difference], *, num_steps: int, rows: int = 12) -> str:
    """What people read: the first differences, and the largest."""
    lines = [
        f"{len(found)} of {num_steps} losses differ; the first:",
        f"{'stage':<10}{'step':>6}  {'A':<24}{'B':<24}relative",
    ]
    lines += [f"{d.stage:<10}{d.step:>6}  {d.a!r:<24}{d.b!r:<24}{d.relative:.2e}" for d in found[:rows]]
    largest = max(found, key=lambda d: d.relative)
    return "\n".join([*lines, f"largest: {largest.relative:.2e} at {largest.stage} step {largest.step}"])


def read_losses(run_dir: Path) -> Losses:
    """The losses of both stages from their metrics.jsonl."""
    losses: Losses = {}
    for stage in ("pretrain", "finetune"):
        file = run_dir / stage / "metrics.jsonl"
        for line in file.read_text().splitlines() if file.exists() else []:
            record = json.loads(line)
            if "loss" in record:
                losses[stage, record["step"]] = record["loss"]
    return losses


@contextmanager
def tree_of(revision: str, folder: Path) -> Iterator[Path]:
    """The sources of `revision`: the working tree itself for `.`, else a worktree that is removed in the end."""
    if revision == ".":
        yield Path.cwd()
        return
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(folder), revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], check=True)


def train(tree: Path, run_dir: Path, *, recipe: Path, sets: list[str], processes: int = 1) -> Losses:
    """Train in `tree`: started there, `-m livt_scale` takes that tree's package, not the installed one."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "livt_scale", "train", str(recipe)]
    for text in [*sets, f"run_dir={run_dir}"]:
        command += ["--set", text]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, cwd=tree, env=environment, check=True)
    return read_losses(run_dir)


def data_sets(recipe: Path, sets: list[str]) -> list[str]:
    """The shards that this working tree would take, as --set: both revisions read the same."""
    from livt_scale.config.load import load_recipe

    data = load_recipe(recipe, sets=sets).data
    return [f"data.train={data.train}", *([f"data.val={data.val}"] if data.val else [])]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the losses of two revisions on one recipe.")
    parser.add_argument("a", metavar="A", help="a git revision, or . for the working tree")
    parser.add_argument("b", metavar="B", help="a git revision, or . for the working tree")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/fashion_mnist_lt/quickstart.yaml")
    parser.add_argument("--epochs", type=int, default=1, help="of each stage")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="A.B=C", help="as for livt train")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="ranks on this machine, by torchrun")
    parser.add_argument("--json", type=Path, help="write the differences to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    recipe = options.recipe.resolve()
    short = [f"stages.*.epochs={options.epochs}", "stages.*.warmup_epochs=0", "log.every_steps=1"]
    sets = [*short, *options.sets]
    sets += data_sets(recipe, sets)
    work = Path(tempfile.mkdtemp(prefix="livt-compare-"))
    try:
        losses = []
        for letter, revision in (("a", options.a), ("b", options.b)):
            print(f"{letter.upper()}: {revision}", flush=True)
            with tree_of(revision, work / f"tree-{letter}") as tree:
                losses.append(
                    train(tree, work / f"run-{letter}", recipe=recipe, sets=sets, processes=options.processes)
                )
    except subprocess.CalledProcessError as error:
        print(f"compare: {error.cmd[0]} ended with exit code {error.returncode}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report(*losses, file=options.json)


def report(a: Losses, b: Losses, *, file: Path | None) -> int:
    """Print what came out, and write it to `file`; the exit code."""
    found = differences(a, b)
    num_steps = len(set(a) | set(b))
    if file:
        rows = [vars(d) for d in found]
        file.write_text(json.dumps({"num_steps": num_steps, "differences": rows}, indent=2) + "\n")
    if not num_steps:
        print("compare: neither revision logged a loss", file=sys.stderr)
        return 2
    print(table(found, num_steps=num_steps) if found else f"equal bit for bit: {num_steps} losses")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
