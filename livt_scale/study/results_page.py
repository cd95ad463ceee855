"""docs/results.md, made of the collected results alone: nothing on it is typed by hand."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from livt_scale.study.claims import CLAIMS, SETTINGS, claim_runs
from livt_scale.study.collect import FORMAT, NOT_RUN, VERSION
from livt_scale.study.comparison import CONFIDENCE, MIN_SEEDS, POWER
from livt_scale.study.cost import KINDS, summarize_cost
from livt_scale.util.errors import DataError
from livt_scale.util.outside import read_json

COLUMNS = {
    "top1_all": "all", "top1_many": "many", "top1_medium": "medium", "top1_few": "few",
    "top1_mean_over_epochs": "mean over epochs", "ece": "calibration error", "pdc": "PDC",
    "reconstruction_loss": "reconstruction loss",
}  # fmt: skip
COMPARED, COMPARED_VERSION = "livt-study-comparison", 1  # of what `livt study compare --json` prints
CROSSINGS, CROSSINGS_VERSION = "livt-study-crossings", 3  # of what `livt study crossing --json` prints
UNITS = {"pretrain_epochs": "epochs of pretraining", "num_images": "images", "num_weights": "weights"}
UNRUN, DEVICE, PRICE = "imagenet_lt", "h100", 2.5  # of a GPU hour, in dollars: an assumption, docs/plan.md has the same
MARK = b"made by `livt reproduce"  # in every page
HEAD = """\
# Results: the paper's claims, checked here

This page has the verdicts on the paper's claims, and on a question of ours. It is made by `livt reproduce … --page
docs/results.md` from results that were collected from run directories and are kept in `docs/results/`; [the paper's
claims](reproducing.md) shows how to run it, here and on ImageNet-LT. Each number is the mean over seeds ± their
standard deviation, on evaluation images. `livt_scale/study/comparison.py` has the rule of a verdict: Student's
paired t test over seeds, with Holm's correction for the number of questions of the claim. Below {level:.0%} the
difference is in favour (confirmed) or against (not confirmed); above it, and with fewer than {least} seeds, it is
not decidable here. A claim is confirmed if each of its questions is, and not confirmed if one is not. Intervals
({confidence:.0%}) are of each question alone; the effect is the mean difference over its deviation; "for one point"
is the number of seeds with which a difference of one point would be found with a probability of {power:.0%}. All
arms have the section's epochs, unless their name differs, and the recipe's learning rate, but for labels alone with
more epochs than fine-tuning; both rates were [chosen on held-out images](reproducing.md#how-the-rate-was-chosen).
Where a section's command has others, nothing was chosen.
"""


def page(results: Sequence[Mapping[str, Any]], studies: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page for these results, in their order, and for studies as `livt study compare --json` prints them."""
    parts = [HEAD.format(confidence=CONFIDENCE, level=1 - CONFIDENCE, least=MIN_SEEDS, power=POWER), _overview(results)]
    return "\n".join([*parts, *(_section(result) for result in results), *map(_of_study, studies), _costs()])


def _overview(results: Sequence[Mapping[str, Any]]) -> str:
    """Every claim in every setting: those without runs are listed as not run."""
    words = {(result["claim"], result["on"]): result["word"] for result in results}
    rows = [f"| claim | {' | '.join(f'`{on}`' for on in SETTINGS)} |", "| --- |" + " --- |" * len(SETTINGS)]
    for name, claim in CLAIMS.items():
        cells = (words.get((name, on)) for on in SETTINGS)
        rows.append(f"| `{name}`: {claim.says} | {' | '.join(f'**{w}**' if w else 'not run' for w in cells)} |")
    return "\n".join([*rows, "", *_hours(results)])


def _hours(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of all runs, each once, where the results have them by run."""
    minutes: dict[tuple[str, str, str], float] = {}
    for result in results:
        sets = json.dumps(result["sets"], sort_keys=True)
        minutes |= {(result["on"], sets, name): each for name, each in result.get("run_minutes", {}).items()}
    if not minutes:
        return []
    without = [f"{r['claim']} on {r['on']}" for r in results if not r.get("run_minutes")]
    taken = f"The {len(minutes)} runs of these results took {sum(minutes.values()) / 60:.1f} hours of training steps"
    return [f"{taken}{', not counted: ' + ', '.join(without) if without else ''}.", ""]


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
        f"`{budget['recipe']}` on `{budget['data']}`: {_epochs(budget)}, where the arm does not say otherwise.",
        "",
        *arms_table(result, of="arm"),
        "",
        f"![{name}]({picture_name(result)})",
        "",
        *verdicts_table(result),
        "",
    ]
    not_run = _not_run(result)
    left_out = {who: why for who, why in result["missing"].items() if who.partition(",")[0] not in not_run}
    if left_out:
        lines += ["Not counted: " + "; ".join(f"{who} ({why})" for who, why in left_out.items()) + ".", ""]
    if not_run:
        lines += [f"Not run: {', '.join(not_run)}.", ""]
    versions = ", ".join(f"{what} {which}" for what, which in result["versions"].items())
    return "\n".join([*lines, f"Made with {versions}.", ""])


def _not_run(result: Mapping[str, Any]) -> list[str]:
    """The claim's arms without a run: those that joined it after the results, too."""
    arms = [arm.name for arm in CLAIMS[result["claim"]].arms(SETTINGS[result["on"]].with_sets(result["sets"]))]
    begun = {who.partition(",")[0] for who, why in result["missing"].items() if why != NOT_RUN}
    return [name for name in arms if name not in result["values"] and name not in begun]


def _of_study(found: Mapping[str, Any]) -> str:
    verb = "compare" if found["format"] == COMPARED else "crossing"
    lines = [f"## Study {found['name']}", "", "```sh", f"livt study {verb} {found['study']}", "```", ""]
    if verb == "crossing":
        picture = f"![gain of the two stages](results/studies/{found['name']}.png)"
        return "\n".join([*lines, *crossing_lines(found), "", picture, ""])
    return "\n".join([*lines, *comparison_lines(found), ""])


def comparison_lines(found: Mapping[str, Any]) -> list[str]:
    """What `compare_settings` found: two tables in Markdown, and the runs that are not counted."""
    missing = [f"not counted: {name}: {why}" for name, why in found["missing"].items()]
    return [*arms_table(found, of="setting"), "", *verdicts_table(found), *([""] if missing else []), *missing]


def crossing_lines(found: Mapping[str, Any]) -> list[str]:
    """For people: a table of the settings, and a sentence for each line, in Markdown."""
    axes = list(found["settings"][0]["setting"]) if found["settings"] else []
    measures = [m for m in ("top1_all", "top1_few") if any(m in row for row in found["settings"])]
    head = [*axes, "images", "epochs of pretraining", "of labels alone", "seeds"]
    for measure in measures:
        head += [f"{COLUMNS[measure]}: both stages", "labels alone", "gain", "interval"]
    rows = [f"| {' | '.join(head)} |", "|" + " ---: |" * len(head)]
    for row in found["settings"]:
        cells = [*map(str, row["setting"].values()), *(f"{row[n]:,}" for n in ("num_images", "pretrain_epochs"))]
        cells += [str(row["labels_epochs"]), str(row["seeds"])]
        for measure in measures:
            if (of := row.get(measure)) is None:  # the set has no such class
                cells += [""] * 4
                continue
            ends = f"{100 * of['low']:+.1f} to {100 * of['high']:+.1f}" if of["low"] is not None else ""
            cells += [f"{100 * of['both']:.1f}", f"{100 * of['labels']:.1f}", f"{100 * of['gain']:+.1f}", ends]
        rows.append(f"| {' | '.join(cells)} |")
    sentences = [f"- {_sentence(line)}" for line in found["lines"]]
    if found["gains"]:
        hours = sum(gain["minutes"] for gain in found["gains"]) / 60
        sentences.append(f"- the {2 * len(found['gains'])} runs that count took {hours:.1f} hours of training steps")
    not_run = [name for name, why in found["missing"].items() if why == NOT_RUN]
    missing = [f"- not counted: {name}: {why}" for name, why in found["missing"].items() if name not in not_run]
    if not_run:
        missing.append(f"- not run: {', '.join(not_run)}")
    return [*rows, "", *sentences, *missing]


def _sentence(line: Mapping[str, Any]) -> str:
    at = "".join(f", {axis} {value}" for axis, value in line["at"].items())
    what = f"{COLUMNS[line['measure']]}{at}: the gain changes by {100 * math.log(2) * line['slope']:+.1f} points"
    told = f"{what} with each doubling of the {UNITS[line['over']]} ({line['from']:,} to {line['to']:,})"
    if line["low"] is None:
        return f"{told}; where it is 0 is not decidable"
    outside = "" if line["from"] <= line["at_zero"] <= line["to"] else ", outside what was trained"
    return f"{told}; it is 0 at {line['at_zero']:,.3g} ({line['low']:,.3g} to {line['high']:,.3g}){outside}"


def _costs() -> str:
    """What the claims would take with the paper's networks and schedules, by the planner."""
    lines = [
        "## What the claims cost on ImageNet-LT",
        "",
        "Nobody has run them here. Three seeds with the paper's networks and schedules, by [`livt plan`](plan.md#time) "
        f"on one {DEVICE.upper()}; several take about as many device hours together. What claims share is trained "
        f"once, so all cost less than their sum. {PRICE:g} dollars an hour is an assumption. Without `--dry-run` and "
        "the price the command trains.",
        "",
        "| command | runs | device hours, likely | low to high | dollars, likely |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    of_claim = {name: claim_runs([name], UNRUN, seeds=range(MIN_SEEDS), sets={}) for name in CLAIMS}
    of_claim["all"] = claim_runs(list(CLAIMS), UNRUN, seeds=range(MIN_SEEDS), sets={})
    summary = summarize_cost(of_claim["all"], Path(), SETTINGS[UNRUN].size_of, device=DEVICE)
    costs = {one["name"]: one for one in summary.runs}
    for name, runs in of_claim.items():
        low, likely, high = (sum(costs[run.name][kind] for run in runs) for kind in KINDS)
        command = f"`livt reproduce {name} --on {UNRUN} --dry-run --price-per-gpu-hour {PRICE:g}`"
        cost = f"{likely:,.0f} | {low:,.0f} to {high:,.0f} | {PRICE * likely:,.0f}"
        lines.append(f"| {command} | {len(runs)} | {cost} |")
    return "\n".join([*lines, ""])


def _epochs(budget: Mapping[str, Any]) -> str:
    if budget["pretrain_epochs"] is None:
        return f"{budget['finetune_epochs']} epochs from scratch"
    return f"{budget['pretrain_epochs']} epochs of pretraining, {budget['finetune_epochs']} of fine-tuning"


def arms_table(result: Mapping[str, Any], *, of: str) -> list[str]:
    """Mean ± deviation over seeds of each measure, a row for each arm. of: what an arm is called."""
    shown = [m for m in COLUMNS if any(m in measured for measured in result["values"].values())]
    rows = [f"| {of} | M weights | seeds | {' | '.join(COLUMNS[m] for m in shown)} | minutes a run |"]
    rows.append("| --- |" + " ---: |" * (len(shown) + 3))
    for arm, measured in result["values"].items():
        count = max(len(by) for by in measured.values())
        cells = " | ".join(_cell(list(measured[m].values()), m) if m in measured else "" for m in shown)
        weights, minutes = f"{result['weights'][arm] / 1e6:.2f}", f"{result['minutes'][arm]:.1f}"
        rows.append(f"| {arm} | {weights} | {count} | {cells} | {minutes} |")
    return rows


def _cell(values: Sequence[float], measure: str) -> str:
    scale, digits = {"reconstruction_loss": (1, 4), "pdc": (1, 2)}.get(measure, (100, 1))
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def verdicts_table(result: Mapping[str, Any]) -> list[str]:
    """Difference, interval and verdict of each question."""
    rows = [
        "| question | difference | interval | effect | p, corrected | seeds | for one point | verdict |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for verdict in result["verdicts"]:
        seeds, cells = verdict["num_seeds"], [""] * 4
        if seeds:
            mean, low, high = (_signed(verdict[key], verdict["unit"]) for key in ("mean", "low", "high"))
            effect = "" if verdict["effect"] is None else f"{verdict['effect']:+.1f}"
            p = "" if verdict["p_holm"] is None else f"{verdict['p_holm']:.3f}"
            cells = [mean, f"{low} to {high}" if seeds > 1 else "", effect, p]
        word, needed = verdict["word"] if seeds else "not run", verdict["seeds_for_a_point"] or ""
        rows.append(f"| {verdict['says']} | {' | '.join(cells)} | {seeds} | {needed} | {word} |")
    return rows


def _signed(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "relative":
        return f"{value:+.1%}"
    return f"{value:+.4f}" if unit == "loss" else f"{100 * value:+.1f}"


def picture_name(result: Mapping[str, Any]) -> str:
    return f"results/{result['claim']}-{result['on']}.png"


def results_json(result: Mapping[str, Any]) -> bytes:
    return (json.dumps(result, indent=1, allow_nan=False) + "\n").encode()


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results that are kept in `folder`, in the order of the claims. Raises DataError: one cannot be read."""
    places = {(claim, on): (k, n) for k, claim in enumerate(CLAIMS) for n, on in enumerate(SETTINGS)}
    found = []
    for file in sorted(folder.glob("*.json")):
        told = _kept(file, (FORMAT, VERSION), what="results of a claim", again="livt reproduce")
        if (told.get("claim"), told.get("on")) not in places:
            raise DataError(f"{file} holds no results of a known claim", remedy="collect it again: livt reproduce")
        found.append(told)
    return sorted(found, key=lambda told: places[told["claim"], told["on"]])


def read_studies(folder: Path) -> list[dict[str, Any]]:
    """The studies that are kept in `folder`/studies, as `livt study compare --json` and `crossing --json` print them.

    Raises DataError.
    """
    return [
        _kept(
            file, (COMPARED, COMPARED_VERSION), (CROSSINGS, CROSSINGS_VERSION),
            what="comparison of a study", again="livt study compare --json",
        )
        for file in sorted((folder / "studies").glob("*.json"))
    ]  # fmt: skip


def read_crossings(file: Path) -> dict[str, Any]:
    """What `livt study crossing --json` printed. Raises DataError."""
    return _kept(file, (CROSSINGS, CROSSINGS_VERSION), what="gains of pretraining", again="livt study crossing --json")


def _kept(file: Path, *kinds: tuple[str, int], what: str, again: str) -> dict[str, Any]:
    try:
        told = read_json(file, "record")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}", remedy=f"collect it again: {again}") from error
    if not isinstance(told, dict) or (told.get("format"), told.get("version")) not in kinds:
        raise DataError(f"{file} holds no {what} as this livt_scale writes it", remedy=f"collect it again: {again}")
    return told
