"""docs/results.md and its pictures, made of the collected results alone: nothing on it is typed by hand."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from livt_scale.durable import write_whole
from livt_scale.errors import DataError
from livt_scale.study.claims import CLAIMS
from livt_scale.study.verdict import CONFIDENCE

COLUMNS = {
    "top1_all": "all", "top1_many": "many", "top1_medium": "medium", "top1_few": "few",
    "top1_mean_over_epochs": "mean over epochs", "reconstruction_loss": "reconstruction loss",
}  # fmt: skip
HEAD = """\
# Results: the paper's claims, checked here

This page is made by `livt reproduce … --page docs/results.md`, of results that it collected from run directories and
keeps in `docs/results/`. Each number is the mean over seeds ± their standard deviation. A verdict is a rule, which
stands in `livt_scale/study/verdict.py`: with the same seeds for both arms, the {confidence:.0%} interval of the
difference lies above 0 (confirmed), below 0 (not confirmed), or holds it (not decidable here). All arms have the
recipe's learning rate and, unless their name says otherwise, its epochs; nothing was tuned for any of them.

What a run leaves behind otherwise, and how it is evaluated: [outputs](outputs.md), [runs](runs.md).
"""


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The page for these results, in their order."""
    parts = [HEAD.format(confidence=CONFIDENCE), _overview(results)]
    return "\n".join([*parts, *(_section(result) for result in results)])


def _overview(results: Sequence[Mapping[str, Any]]) -> str:
    rows = [f"| {r['says']} | {r['on']} | **{r['word']}** |" for r in results]
    return "\n".join(["| claim | on | verdict |", "| --- | --- | --- |", *rows, ""])


def _section(result: Mapping[str, Any]) -> str:
    budget, name = result["budget"], f"{result['claim']} on {result['on']}"
    sets = "".join(f" --set {path}={value}" for path, value in result["sets"].items())
    lines = [
        f"## {name}",
        "",
        f"{result['says']} **{result['word'].capitalize()}.**",
        "",
        "```sh",
        f"livt reproduce {result['claim']} --on {result['on']} --seeds {len(result['seeds'])}{sets}",
        "```",
        "",
        f"`{budget['recipe']}` on `{budget['data']}`: {budget['pretrain_epochs']} epochs of pretraining, "
        f"{budget['finetune_epochs']} of fine-tuning, where the arm does not say otherwise.",
        "",
        *_table(result),
        "",
        f"![{name}]({picture_name(result)})",
        "",
        *_verdicts(result),
        "",
    ]
    if result["missing"]:
        lines += ["Not counted: " + "; ".join(f"{who} ({why})" for who, why in result["missing"].items()) + ".", ""]
    versions = ", ".join(f"{what} {which}" for what, which in result["versions"].items())
    return "\n".join([*lines, f"Made with {versions}.", ""])


def _table(result: Mapping[str, Any]) -> list[str]:
    shown = [m for m in COLUMNS if any(m in of for of in result["values"].values())]
    rows = [f"| arm | seeds | {' | '.join(COLUMNS[m] for m in shown)} | minutes a run |"]
    rows.append("| --- |" + " ---: |" * (len(shown) + 2))
    for arm, of in result["values"].items():
        count = max(len(by) for by in of.values())
        cells = " | ".join(_cell(list(of[m].values()), m) if m in of else "" for m in shown)
        rows.append(f"| {arm} | {count} | {cells} | {result['minutes'][arm]:.1f} |")
    return rows


def _cell(values: Sequence[float], measure: str) -> str:
    scale, digits = (1, 4) if measure == "reconstruction_loss" else (100, 1)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{scale * statistics.fmean(values):.{digits}f} ± {scale * spread:.{digits}f}"


def _verdicts(result: Mapping[str, Any]) -> list[str]:
    rows = ["| question | difference | interval | seeds | verdict |", "| --- | ---: | ---: | ---: | --- |"]
    for verdict in result["verdicts"]:
        mean, low, high = (_signed(verdict[key], verdict["says"]) for key in ("mean", "low", "high"))
        told = f"{mean} | {low} to {high}" if verdict["num_seeds"] > 1 else " | "
        rows.append(f"| {verdict['says']} | {told} | {verdict['num_seeds']} | {verdict['word']} |")
    return rows


def _signed(value: float, says: str) -> str:
    if " like " in says:
        return f"{value:+.1%}"
    return f"{value:+.4f}" if "reconstruction" in says else f"{100 * value:+.1f}"


def picture_name(result: Mapping[str, Any]) -> str:
    return f"results/{result['claim']}-{result['on']}.png"


def picture(result: Mapping[str, Any], path: Path) -> None:
    """Bars of each arm with its seeds as dots; beside them accuracy by epoch, where arms were evaluated by epoch."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    measure = next(
        (m for m in ("top1_all", "reconstruction_loss") if any(m in v for v in result["values"].values())), ""
    )
    arms = [arm for arm, of in result["values"].items() if measure in of]
    curves = {arm: lines for arm, lines in result["curves"].items() if any(len(line) > 1 for line in lines)}
    figure = Figure(figsize=(9 if curves else 5, 0.35 * max(len(arms), 4) + 1.4), layout="constrained")
    axes = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
    scale = 100 if measure.startswith("top1") else 1
    for row, arm in enumerate(reversed(arms)):
        values = [scale * v for v in result["values"][arm][measure].values()]
        axes[0].barh(row, statistics.fmean(values), color="#9ecae1")
        axes[0].plot(values, [row] * len(values), "o", color="#08519c", markersize=3)
    axes[0].set_yticks(range(len(arms)), list(reversed(arms)), fontsize=8)
    axes[0].set_xlabel(f"{COLUMNS.get(measure, measure)}{', top-1 %' if scale == 100 else ''}")
    lowest = min((scale * v for arm in arms for v in result["values"][arm][measure].values()), default=0)
    axes[0].set_xlim(left=max(0, lowest - 0.25 * abs(lowest)))
    if curves:
        for arm, lines in curves.items():
            whole = [line for line in lines if len(line) == max(map(len, lines))]
            mean = [100 * statistics.fmean(each) for each in zip(*whole, strict=True)]
            axes[1].plot(range(1, len(mean) + 1), mean, label=arm, linewidth=1.2)
        axes[1].set_xlabel("epoch of fine-tuning")
        axes[1].set_ylabel("top-1 %, all")
        axes[1].legend(fontsize=6)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    write_whole(path, data.getvalue())


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results that are kept in `folder`, in the order of the claims. Raises DataError: one cannot be read."""
    order = list(CLAIMS)
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            found.append(json.loads(file.read_bytes()))
        except ValueError as error:
            raise DataError(f"{file} is not JSON: {error}", remedy="collect it again: livt reproduce") from error
    return sorted(found, key=lambda result: (order.index(result["claim"]), result["on"]))
