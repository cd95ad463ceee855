"""The planner's formula for memory against `livt plan --exact`, over models, strategies, recomputing and ranks.

    python benchmarks/plan_exact.py --json plan-exact.json          # 60 settings from 18 measurements; 4 CPU minutes
    python benchmarks/plan_exact.py --quick                         # ViT-B under fsdp and zero2, 8 ranks, kept

Goes on from FILE: each measurement is kept as it comes; after a change of the models take another one. A measurement
serves several settings where they compute alike: ddp and the zeros run the same whole replica on any number of ranks,
and only what their engines add, by formula, differs. So under the zeros both columns have the same states;
tests/plan/test_memory.py holds those against DeepSpeed itself.
It ends with 1 where states differ by more than 10 % or a peak by more than 20 %.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from livt_scale.config.capabilities import CAPABILITIES, STRATEGIES, StrategyName
from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Recipe, Stage
from livt_scale.plan.exact import Measurement, measure_computing, with_engine
from livt_scale.plan.memory import Memory, Spread, plan_memory
from livt_scale.plan.parameters import weights_of
from livt_scale.util.atomic import write_atomic

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "imagenet_lt"
MODELS = {"ViT-B": "vit_b16", "ViT-L": "vit_l16", "ViT-H": "vit_h14"}
CLASSES = 1000
STATES_WITHIN, PEAK_WITHIN = 0.10, 0.20
BOUND_S = 900  # of one measurement; `livt plan` has 120, on a machine that does nothing else
MIB = 2**20


@dataclass(frozen=True)
class Setting:
    model: str
    stage: Stage
    strategy: StrategyName
    recompute: bool
    ranks: int
    micro_batch: int

    @property
    def spread(self) -> Spread:
        return Spread(self.strategy, self.ranks, "bf16", self.micro_batch, 1, self.recompute)

    @property
    def measured_as(self) -> str:
        """What is measured for it: a name that settings share which compute alike."""
        how = f"fsdp, {self.ranks} ranks" if self.strategy == "fsdp" else "replica"
        again = "recomputed" if self.recompute else "kept"
        return f"{self.model}, {self.stage}, {self.micro_batch} images, {again}, {how}, torch {version('torch')}"

    def recipe(self) -> Recipe:
        return load_recipe(RECIPES / f"{MODELS[self.model]}.yaml").at(self.stage)


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    for model in args.models:
        for strategy in args.strategies:
            for recompute in args.recompute:
                for ranks in args.ranks:
                    yield Setting(model, args.stage, strategy, recompute, ranks, args.micro_batch)


def measured(setting: Setting, kept: dict[str, Any], file: Path | None) -> Measurement:
    """From `kept`, or taken now and kept, also in `file`."""
    name = setting.measured_as
    if name not in kept:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        found = measure_computing(setting.recipe(), setting.stage, setting.spread, num_classes=CLASSES, bound_s=BOUND_S)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        kept[name] = {"found": asdict(found), "s": time.perf_counter() - start, "cpu_s": cpu_s}
        if file is not None:
            write_atomic(file, (json.dumps(kept, indent=1) + "\n").encode())
    return Measurement(**kept[name]["found"])


@dataclass(frozen=True)
class Compared:
    setting: Setting
    exact: Measurement
    formula: Memory

    @property
    def states_off(self) -> float:
        return self.formula.states / self.exact.states - 1

    @property
    def peak_off(self) -> float:
        return self.formula.peak / self.exact.peak - 1

    @property
    def within(self) -> bool:
        return abs(self.states_off) <= STATES_WITHIN and abs(self.peak_off) <= PEAK_WITHIN


def compare(setting: Setting, computing: Measurement) -> Compared:
    recipe = setting.recipe()
    weights = weights_of(recipe.model, setting.stage, num_classes=CLASSES)
    exact = with_engine(computing, recipe, setting.stage, setting.spread, num_classes=CLASSES)
    return Compared(setting, exact, plan_memory(recipe, setting.stage, weights, setting.spread))


def table(rows: list[Compared]) -> str:
    """The measured peak in MiB and what the formula's differs, a column for each model and number of ranks."""
    columns = list(dict.fromkeys((row.setting.model, row.setting.ranks) for row in rows))
    lines = [
        "| peak, MiB | " + " | ".join(f"{model}, {ranks} ranks" for model, ranks in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    cells: dict[str, dict[tuple[str, int], str]] = {}
    for row in rows:
        at = row.setting
        name = at.strategy + (", recomputed" if at.recompute else "")
        said = f"{row.exact.peak / MIB:.0f}, {100 * row.peak_off:+.1f} %{'' if row.within else ' OUT'}"
        cells.setdefault(name, {})[at.model, at.ranks] = said
    lines += [f"| {name} | " + " | ".join(of[column] for column in columns) + " |" for name, of in cells.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="The planner's memory by formula against --exact.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=["fsdp", "ddp", "zero1", "zero2", "zero3"]
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--stage", choices=["pretrain", "finetune"], default="pretrain")
    parser.add_argument("--micro-batch", type=int, default=32, help="images of a rank at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the measurements there, and go on from it")
    parser.add_argument("--quick", action="store_true", help="two settings of ViT-B")
    args = parser.parse_args()
    args.recompute = [False, True]
    if args.quick:
        args.models, args.strategies, args.ranks, args.recompute = ["ViT-B"], ["fsdp", "zero2"], [8], [False]
    kept = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    rows = [compare(each, measured(each, kept, args.json)) for each in settings(args)]
    print(table(rows))
    out = [row for row in rows if not row.within]
    of_torch = [row for row in rows if CAPABILITIES[row.setting.strategy].zero_stage is None]
    states = max((abs(row.states_off) for row in of_torch), default=0.0)
    seconds, cpu_s = max(each["s"] for each in kept.values()), max(each["cpu_s"] for each in kept.values())
    resident = max(each["found"]["resident_bytes"] for each in kept.values())
    print(
        f"\n{len(rows)} settings, {len(out)} out of the bounds (states {STATES_WITHIN:.0%}, peak {PEAK_WITHIN:.0%}); "
        f"measured states (fsdp, ddp) differ by no more than {states:.4%}. The longest of {len(kept)} measurements "
        f"took {seconds:.0f} s ({cpu_s:.0f} s of a core), the largest {resident / MIB:.0f} MiB."
    )
    return 1 if out else 0


if __name__ == "__main__":
    sys.exit(main())
