"""What training ViT-B, L and H would take on 1 to 4096 GPUs: docs/scale.md, by `livt plan` alone. No GPU, no torch.

    python benchmarks/scale.py --page docs/scale.md     # under a minute
    python benchmarks/scale.py --quick                  # ViT-B alone, on the terminal

Each row is one call of the command that stands above its table; nothing is typed by hand but the words.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from livt_scale.cli import main as cli
from livt_scale.util.atomic import write_atomic
from livt_scale.util.errors import UsageError
from livt_scale.util.plots import PALETTE, png_figure

MODELS = {"ViT-B/16": "vit_b16", "ViT-L/16": "vit_l16", "ViT-H/14": "vit_h14"}
GPUS = [2**k for k in range(13)]
DEVICE = "h100"
IMAGES_A_GPU = 64  # of the weak scaling
ENOUGH_IMAGES = 1_281_167  # ImageNet-1k's: an epoch holds a global batch of 64 · 4096
FAILING, FAILING_GPUS = "ViT-H/14", [64, 512, 4096]
DETECT_S, REQUEUE_S, START_S = 30, 600, 120  # of the simulation: the watchdog's bound, a short queue, slurm.start_s
WORK_DAYS, SEEDS = 30, 10
PARTS_ON, FP16 = ("v100", "a100", "h100"), "--set parallel.precision=fp16 --strategy auto"
MTBF_NODE_DAYS = [100, 300, 1000, 3000]
ALONE = {  # one stage without the other
    "pretrain": "--set stages.finetune=null",
    "finetune": "--set stages.pretrain=null --set stages.finetune.init=scratch",
}
NAMES = {"pretrain": "pretraining", "finetune": "fine-tuning"}
HEAD = """\
# Scale

This page estimates what training takes on 1 to 4096 GPUs ({device}); nothing on it is measured. It is made by
`python benchmarks/scale.py --page docs/scale.md`; every figure is from `livt plan` ([plan](plan.md)). The command above
each table is for one of its numbers of GPUs; the second command gives the weak scaling.

- **step**: of the fastest choice of strategy, recomputation and micro-batch that fits; "64 × 2": two micro-batches of
  64. **limit**: what decides it. **hours**: low, likely, high.
- **efficiency**: relative to the smallest number of GPUs that fits, at the recipe's global batch: the result stays
  the same, and each GPU has less work.
- **weak**: the same with {images} images per GPU, so that the global batch grows with the GPUs: the result changes,
  and the learning rate has to be found again. Above 100 %: fsdp shards AdamW's work, which one GPU does alone.
- **traffic**: through one rank, per step. **stall**: the time that a save holds training up; it is written meanwhile.
- **Daly**: the interval between saves that loses least. **lost**: the share of time, with this interval, for saves,
  repeated work and restarts, if a node fails every {mtbf:g} days on average.

The figures are only as good as the assumptions; published times are mostly in such ranges
([plan](plan.md#published)). They do not include slow nodes, shared networks or queueing. Assumptions (`--assume
NAME=VALUE` changes one):

"""


def plan(*words: str) -> dict[str, Any]:
    """What `livt plan WORDS --json` prints. Raises the command's UsageError."""
    result = CliRunner().invoke(cli.app, ["plan", *words, "--json"], catch_exceptions=False)
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def command(recipe: str, gpus: int, stage: str, *more: str) -> str:
    words = [
        f"livt plan recipes/imagenet_lt/{recipe}.yaml --gpus {gpus} --device {DEVICE} --strategy auto",
        ALONE[stage],
    ]
    return " ".join([*words, *more])


def asked(line: str) -> dict[str, Any] | None:
    """The one stage that a command line plans; None where nothing fits."""
    stage: dict[str, Any] = plan(*shlex.split(line)[2:])["stages"][0]
    return stage if stage["fits"] else None


def weakly(recipe: str, gpus: int, stage: str) -> str:
    batch = f"--set stages.{stage}.global_batch={IMAGES_A_GPU * gpus} --set stages.{stage}.micro_batch={IMAGES_A_GPU}"
    return command(recipe, gpus, stage, batch, f"--images {ENOUGH_IMAGES} --classes 1000")


def stage_table(recipe: str, stage: str, gpus: Sequence[int]) -> list[str]:
    """A row for each number of GPUs; the last one says why there are no more."""
    titles = (
        "GPUs | strategy, micro-batch | limit | step, ms | efficiency | weak | traffic, GB | hours | checkpoint, GB "
    )
    titles += "| stall, s | Daly, min | lost"
    lines = [f"| {titles} |", "| ---: | --- | --- |" + " ---: |" * 9]
    first = first_weak = None
    for number in gpus:
        try:
            one = asked(command(recipe, number, stage))
        except UsageError as error:
            lines.append(f"\n{number} GPUs and more: no figure, {error.message}.")
            break
        if one is None:
            lines.append(f"| {number} | nothing fits |" + " - |" * 10)
            continue
        weak = asked(weakly(recipe, number, stage))
        work = one["step_s"] * number
        first, first_weak = first or work, first_weak or (weak and weak["step_s"])
        lines.append(row(number, one, first / work, first_weak / weak["step_s"] if weak else None))
    return lines


def row(gpus: int, one: dict[str, Any], efficiency: float, weak: float | None) -> str:
    saved = one["checkpoint"]
    again = ", recomputed" if one["activation_checkpointing"] else ""
    chosen = f"{one['strategy']}{again}, {one['micro_batch']} × {one['accumulation']}"
    cells = [
        f"{gpus}", chosen, one["limit"]["name"], f"{1000 * one['step_s']:.4g}",
        f"{efficiency:.0%}", "-" if weak is None else f"{weak:.0%}", f"{one['exchanged_bytes_per_rank'] / 1e9:.2f}",
        " – ".join(f"{one[name]:.2g}" for name in ("hours_low", "hours", "hours_high")),
        f"{saved['bytes'] / 1e9:.2f}", f"{saved['stall_s']:.2g}",
        f"{saved['daly_interval_s'] / 60:.0f}", f"{saved['lost_share_daly']:.2%}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def section(name: str, stage: str, gpus: Sequence[int] = GPUS) -> str:
    recipe = MODELS[name]
    lines = [
        f"## {name}, {NAMES[stage]}",
        "",
        "```sh",
        command(recipe, 64, stage),
        weakly(recipe, 64, stage),
        "```",
        "",
    ]
    return "\n".join([*lines, *stage_table(recipe, stage, gpus)]) + "\n"


def failures() -> str:
    """Daly's interval and what is lost, by formula and in a simulated run, by GPUs and by how often nodes fail."""

    def line(gpus: int, days: int) -> str:
        return command(MODELS[FAILING], gpus, "pretrain", f"--assume mtbf_node_days={days}")

    lines = [
        "## Nodes that fail", "",
        f"{FAILING}, pretraining: Daly's interval between saves, and the share of time lost with it, by the formula",
        f"and in a simulation of {WORK_DAYS} days of work (mean of {SEEDS} runs), if a node fails once in the given",
        f"number of days on average. Simulated: a failure is noticed after {DETECT_S} s, the job waits {REQUEUE_S} s",
        "in the queue and starts again, and failures also hit restarts. The formula knows saves, repeated work and",
        "the start alone, so that it says less.", "",
        "```sh", line(4096, 100), "```", "",
        "| GPUs | " + " | ".join(f"{days} days" for days in MTBF_NODE_DAYS) + " |",
        "| ---: |" + " ---: |" * len(MTBF_NODE_DAYS),
    ]  # fmt: skip
    for gpus in FAILING_GPUS:
        cells = []
        for days in MTBF_NODE_DAYS:
            one = asked(line(gpus, days))
            cells.append(failing(one, days) if one else "-")
        lines.append(f"| {gpus} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class FailingRun:
    """A run of `work_s` seconds and how it fails: exponentially, every `mtbf_s` seconds on average."""

    work_s: float
    interval_s: float
    save_s: float
    mtbf_s: float
    detect_s: float = 0.0
    requeue_s: float = 0.0
    start_s: float = 0.0


@dataclass(frozen=True)
class Lost:
    """Seconds of a simulated run. share: of the total that was not work done for good."""

    total_s: float
    saves_s: float
    again_s: float
    waits_s: float
    failures: int
    finished: bool = True

    @property
    def share(self) -> float:
        return (self.saves_s + self.again_s + self.waits_s) / self.total_s


def simulate(run: FailingRun, *, seed: int, max_failures: int = 100_000) -> Lost:
    """One run until its work is done, or until it has failed `max_failures` times."""
    draw = random.Random(seed)
    done = now = saves_s = again_s = waits_s = 0.0
    failures = 0
    fails_at = draw.expovariate(1 / run.mtbf_s)
    while done < run.work_s:
        piece = min(run.interval_s, run.work_s - done)
        needed = piece + run.save_s
        if now + needed <= fails_at:
            now, done, saves_s = now + needed, done + piece, saves_s + run.save_s
            continue
        failures += 1
        again_s += fails_at - now  # since the last complete save
        if failures == max_failures:
            return Lost(fails_at, saves_s, again_s, waits_s, failures, finished=False)
        now, wait_s = _restarted(run, draw, fails_at)
        waits_s += wait_s
        fails_at = now + draw.expovariate(1 / run.mtbf_s)
    return Lost(now, saves_s, again_s, waits_s, failures)


def _restarted(run: FailingRun, draw: random.Random, failed_at: float) -> tuple[float, float]:
    """(when training continues, seconds since the failure): a start may fail too, and is then repeated."""
    now = failed_at + run.detect_s
    while True:
        now += run.requeue_s
        until_failure = draw.expovariate(1 / run.mtbf_s)
        if until_failure >= run.start_s:
            return now + run.start_s, now + run.start_s - failed_at
        now += until_failure + run.detect_s


def failing(one: dict[str, Any], days: int) -> str:
    """Interval, lost share by the formula, lost share simulated."""
    saved = one["checkpoint"]
    run = FailingRun(
        work_s=WORK_DAYS * 86400, interval_s=saved["daly_interval_s"], save_s=saved["stall_s"],
        mtbf_s=days * 86400 / one["nodes"], detect_s=DETECT_S, requeue_s=REQUEUE_S, start_s=START_S + saved["write_s"],
    )  # fmt: skip
    share = statistics.mean(simulate(run, seed=seed).share for seed in range(SEEDS))
    return f"{saved['daly_interval_s'] / 60:.0f} min, {saved['lost_share_daly']:.2%}, {share:.2%}"


def head() -> str:
    answer = plan(*shlex.split(command(MODELS["ViT-B/16"], 64, "pretrain"))[2:])
    assumed, device = answer["assumptions"], answer["device"]
    said = HEAD.format(device=device["name"].upper(), images=IMAGES_A_GPU, mtbf=assumed["mtbf_node_days"]["value"])
    lines = ["| assumed | value | what it is |", "| --- | ---: | --- |"]
    for name, one in assumed.items():
        span = "" if one["low"] == one["high"] else f" ({one['low']:g} to {one['high']:g})"
        lines.append(f"| `{name}` | {one['value']:g}{span} | {one['is']} |")
    numbers = {name: value for name, value in device.items() if isinstance(value, int | float)}
    numbers |= {f"peak_tflops.{name}": value for name, value in device["peak_tflops"].items() if value}
    lines += [
        f"| {device['name']} `{name}` | {value:g} | of the device: the maker's |" for name, value in numbers.items()
    ]
    return said + "\n".join(lines) + "\n"


def page() -> str:
    sections = [section(name, stage) for name in MODELS for stage in NAMES]
    return "\n".join([head(), *sections, failures()])


def draw_parts(path: Path) -> None:
    """A bar for each model, stage and device: which part of a step takes which share, on one node."""
    bars = {}
    for name, recipe in MODELS.items():
        for stage, title in NAMES.items():
            for device in PARTS_ON:
                one = asked(
                    f"livt plan recipes/imagenet_lt/{recipe}.yaml --gpus 8 --device {device} {ALONE[stage]} {FP16}"
                )
                if one is not None:
                    bars[f"{name}, {title}, 8 {device}"] = one["parts_s"]
    with png_figure(path, width=8, height=0.28 * len(bars) + 1.2, made_by="benchmarks/scale.py") as figure:
        axes = figure.subplots()
        left = [0.0] * len(bars)
        for part, colour in zip(next(iter(bars.values())), PALETTE, strict=False):
            shares = [parts[part] / sum(parts.values()) for parts in bars.values()]
            axes.barh(range(len(bars)), shares, left=left, color=colour, label=part)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of a step, by the plan's likely values")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=6)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted scaling from 1 to 4096 GPUs.")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page there; None: print it")
    parser.add_argument("--quick", action="store_true", help="ViT-B's pretraining alone")
    parser.add_argument("--parts", type=Path, metavar="PNG", help="draw the parts of a step there, and nothing else")
    args = parser.parse_args()
    if args.parts:
        draw_parts(args.parts)
        return
    text = section("ViT-B/16", "pretrain", GPUS[:4]) if args.quick else page()
    if args.page is None:
        print(text)
    else:
        write_atomic(args.page, text.encode())


if __name__ == "__main__":
    main()
