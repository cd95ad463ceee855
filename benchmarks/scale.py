"""What training ViT-B, L and H would take on 1 to 4096 GPUs: docs/scale.md, by `livt plan` alone. No GPU, no torch.

    python benchmarks/scale.py --page docs/scale.md     # under a minute
    python benchmarks/scale.py --quick                  # ViT-B alone, on the terminal

Each row is one call of the command that stands above its table; nothing is typed by hand but the words.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from livt_scale.cli import main as cli
from livt_scale.util.atomic import write_atomic
from livt_scale.util.errors import UsageError

MODELS = {"ViT-B/16": "vit_b16", "ViT-L/16": "vit_l16", "ViT-H/14": "vit_h14"}
GPUS = [2**k for k in range(13)]
DEVICE = "h100"
IMAGES_A_GPU = 64  # of the weak scaling
ENOUGH_IMAGES = 1_281_167  # ImageNet-1k's: an epoch holds a global batch of 64 · 4096
FAILING_GPUS = [64, 512, 4096]
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
  64.
- **efficiency**: relative to the smallest number of GPUs that fits, at the recipe's global batch: the result stays
  the same, and each GPU has less work.
- **weak**: the same with {images} images per GPU, so that the global batch grows with the GPUs: the result changes,
  and the learning rate has to be found again. Above 100 %: fsdp shards AdamW's work, which one GPU does alone.
- **traffic**: through one rank, per step. **stall**: the time that a save holds training up; it is written meanwhile.
- **Daly**: the interval between saves that loses least. **lost**: the share of time, with this interval, for saves,
  repeated work and restarts, if a node fails every {mtbf:g} days on average.

The figures are only as good as the assumptions; they have not been compared with a GPU yet. They do not include slow
nodes, shared networks, evaluation, queueing, or a file system that cannot feed the loaders. Assumptions (`--assume
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
        "GPUs | strategy, micro-batch | step, ms | efficiency | weak | traffic, GB | all steps, h | checkpoint, GB "
    )
    titles += "| stall, s | Daly, min | lost"
    lines = [f"| {titles} |", "| ---: | --- |" + " ---: |" * 9]
    first = first_weak = None
    for number in gpus:
        try:
            one = asked(command(recipe, number, stage))
        except UsageError as error:
            lines.append(f"\n{number} GPUs and more: no figure, {error.message}.")
            break
        if one is None:
            lines.append(f"| {number} | nothing fits |" + " - |" * 9)
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
        f"{gpus}", chosen, f"{1000 * one['step_s']:.4g}",
        f"{efficiency:.0%}", "-" if weak is None else f"{weak:.0%}", f"{one['exchanged_bytes_per_rank'] / 1e9:.2f}",
        f"{one['hours']:.3g}", f"{saved['bytes'] / 1e9:.2f}", f"{saved['stall_s']:.2g}",
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
    """Daly's interval and what is lost, by GPUs and by how often nodes fail."""

    def line(recipe: str, gpus: int, days: int) -> str:
        return command(recipe, gpus, "pretrain", f"--assume mtbf_node_days={days}")

    lines = [
        "## Nodes that fail", "",
        "Pretraining: Daly's interval between saves, and the share of time lost with it, if a node fails once in the "
        "given number of", "days on average. With more nodes, one of them fails more often.", "",
        "```sh", line(MODELS["ViT-H/14"], 4096, 100), "```", "",
        "| model, GPUs | " + " | ".join(f"{days} days" for days in MTBF_NODE_DAYS) + " |",
        "| --- |" + " ---: |" * len(MTBF_NODE_DAYS),
    ]  # fmt: skip
    for name, recipe in MODELS.items():
        for gpus in FAILING_GPUS:
            cells = []
            for days in MTBF_NODE_DAYS:
                one = asked(line(recipe, gpus, days))
                saved = one["checkpoint"] if one else None
                cells.append(
                    f"{saved['daly_interval_s'] / 60:.0f} min, {saved['lost_share_daly']:.2%}" if saved else "-"
                )
            lines.append(f"| {name}, {gpus} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def head() -> str:
    answer = plan(*shlex.split(command(MODELS["ViT-B/16"], 64, "pretrain"))[2:])
    assumed, device = answer["assumptions"], answer["device"]
    said = HEAD.format(device=device["name"].upper(), images=IMAGES_A_GPU, mtbf=assumed["mtbf_node_days"]["value"])
    lines = ["| assumed | value | what it is |", "| --- | ---: | --- |"]
    lines += [f"| `{name}` | {one['value']:g} | {one['is']} |" for name, one in assumed.items()]
    numbers = {name: value for name, value in device.items() if isinstance(value, int | float)}
    numbers |= {f"peak_tflops.{name}": value for name, value in device["peak_tflops"].items() if value}
    lines += [
        f"| {device['name']} `{name}` | {value:g} | of the device: the maker's |" for name, value in numbers.items()
    ]
    return said + "\n".join(lines) + "\n"


def page() -> str:
    sections = [section(name, stage) for name in MODELS for stage in NAMES]
    return "\n".join([head(), *sections, failures()])


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted scaling from 1 to 4096 GPUs.")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page there; None: print it")
    parser.add_argument("--quick", action="store_true", help="ViT-B's pretraining alone")
    args = parser.parse_args()
    text = section("ViT-B/16", "pretrain", GPUS[:4]) if args.quick else page()
    if args.page is None:
        print(text)
    else:
        write_atomic(args.page, text.encode())


if __name__ == "__main__":
    main()
