"""When pretraining pays: the axis `start`, runs of both starts, and the point where the gain is 0."""

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import linregress
from typer.testing import CliRunner

from livt_scale.cli import main
from livt_scale.study import local_runner, results_page
from livt_scale.study.crossing import crossing, crossings_of
from livt_scale.study.definition import FROM_SCRATCH, last_run, load_study, points, runs, stages_of
from livt_scale.study.local_runner import run_all
from livt_scale.study.results_figure import draw_crossings
from livt_scale.study.slurm_runner import ready, whole_recipe
from livt_scale.study.table import collect_study
from livt_scale.util.errors import UsageError
from tests.study.test_study import TINY, loaded, warm_popen
from tests.whole_runs import small_data

STARTS = ["pretraining", FROM_SCRATCH]

# --- the line and its zero ---


@given(
    at_zero=st.floats(2, 500), slope=st.floats(0.001, 0.5) | st.floats(-0.5, -0.001),
    xs=st.lists(st.integers(1, 2000), min_size=2, max_size=6, unique=True),
)  # fmt: skip
def test_a_line_without_noise_is_found_with_no_room_around_its_zero(at_zero, slope, xs):
    assume(max(xs) > 1.1 * min(xs))
    found = crossing([x for x in xs for _ in range(2)], [slope * math.log(x / at_zero) for x in xs for _ in range(2)])
    assert found.slope == pytest.approx(slope, rel=1e-6)
    assert found.at_zero == pytest.approx(at_zero, rel=1e-5)
    assert found.low == pytest.approx(at_zero, rel=1e-3)
    assert found.high == pytest.approx(at_zero, rel=1e-3)


@given(gains=st.lists(st.floats(-0.2, 0.2), min_size=6, max_size=6))
def test_the_slope_is_that_of_an_independent_regression_and_the_zero_lies_in_its_interval(gains):
    xs = [30, 30, 120, 120, 400, 400]
    assume(np.ptp(gains) > 1e-6)
    found, known = crossing(xs, gains), linregress(np.log(xs), gains)
    assert found.slope == pytest.approx(known.slope, abs=1e-12)
    decided = found.low is not None
    assert decided == (known.pvalue < 0.05) or known.pvalue == pytest.approx(0.05, rel=1e-6)
    if decided:
        assert found.low <= found.at_zero * (1 + 1e-9)
        assert found.at_zero <= found.high * (1 + 1e-9)


def test_the_interval_holds_the_true_zero_as_often_as_it_says():
    rng, xs = np.random.default_rng(0), np.repeat([30.0, 120.0, 400.0], 3)
    held = decided = 0
    for _ in range(2000):
        found = crossing(xs, 0.04 * np.log(xs / 90) + rng.normal(0, 0.01, len(xs)))
        decided += found.low is not None
        held += found.low is not None and found.low <= 90 <= found.high
    assert decided > 1900
    assert held / decided == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("xs", [[30, 120], [30, 30, 30]])
def test_too_few_points_have_no_line(xs):
    assert crossing(xs, [0.1] * len(xs)) is None


def test_a_flat_line_has_no_zero():
    found = crossing([30, 60, 120], [0.1, 0.1, 0.1])
    assert found.slope == 0
    assert (found.at_zero, found.low, found.high) == (None, None, None)


# --- the axis ---


def both_starts(folder, **changes):
    return loaded(folder, axes={"epochs": [2, 4], "start": STARTS, "seed": [3]}, **changes)


def test_labels_alone_have_no_pretraining_and_the_compute_of_both_stages(tmp_path):
    study = both_starts(tmp_path)
    every = {point.name: point for point in points(study)}
    assert list(every) == [f"epochs-{e}-{start}" for e in (2, 4) for start in STARTS]
    for name, point in every.items():
        alone = name.endswith(FROM_SCRATCH)
        assert stages_of(study, point) == (("finetune",) if alone else ("pretrain", "finetune"))
        recipe = last_run(study, point).load(study.folder)
        assert (recipe.stage("finetune").init == "scratch") == alone
        assert whole_recipe(study, point).stage_names == stages_of(study, point)
    assert [(run.name, run.after) for run in runs(study) if run.stage == "finetune"][1] == (
        f"epochs-2-{FROM_SCRATCH}",
        None,
    )
    assert [run.stage for run in runs(study)].count("pretrain") == 2
    assert f"epochs-4-{FROM_SCRATCH}" in [p.name for p in ready(study, points(study)).points]
    flops = {
        run["name"]: run["flops"]
        for run in collect_study(both_starts(tmp_path, sets={**TINY["sets"], **small_data()}))["runs"]
    }
    for epochs in (2, 4):
        assert flops[f"epochs-{epochs}-{FROM_SCRATCH}"] >= flops[f"epochs-{epochs}-pretraining"]
    assert flops[f"epochs-4-{FROM_SCRATCH}"] > flops[f"epochs-2-{FROM_SCRATCH}"]


def test_a_start_may_have_overrides_of_its_own(tmp_path):
    study = both_starts(tmp_path, starts={FROM_SCRATCH: {"stages.finetune.base_lr": 1e-3}})
    rates = {p.name: study.load(p.sets).stage("finetune").base_lr for p in points(study)}
    assert {name for name, rate in rates.items() if rate == 1e-3} == {f"epochs-{e}-{FROM_SCRATCH}" for e in (2, 4)}
    axes = {"start": STARTS, "finetune_learning_rate": [2e-3], "seed": [3]}
    of_axis = loaded(tmp_path, axes=axes, starts={FROM_SCRATCH: {"stages.finetune.base_lr": 1e-3}})
    assert {of_axis.load(p.sets).stage("finetune").base_lr for p in points(of_axis)} == {2e-3}, (
        "an axis is what is varied"
    )


def test_from_scratch_the_overrides_of_its_start_count_and_its_epochs_are_of_the_compute_of_both_stages(tmp_path):
    own = {"stages.finetune.layer_decay": 0.9, "stages.finetune.base_lr": 1e-3}
    starts = {"pretraining": {"stages.finetune.epochs": 2}, FROM_SCRATCH: own}
    plain, study = both_starts(tmp_path), both_starts(tmp_path, starts=starts)

    def alone(study):
        return [study.load(p.sets).stage("finetune") for p in points(study) if p.axes["start"] == FROM_SCRATCH]

    assert {(part.layer_decay, part.base_lr, part.init) for part in alone(study)} == {(0.9, 1e-3, "scratch")}
    assert [part.epochs - 1 for part in alone(study)] == [part.epochs for part in alone(plain)]
    with pytest.raises(UsageError, match=r"stages\.\*\.epochs, which follows from the compute of both stages"):
        both_starts(tmp_path, starts={FROM_SCRATCH: {"stages.*.epochs": 3}})


def test_a_start_needs_both_stages(tmp_path):
    with pytest.raises(UsageError, match=r"axes\.start needs both stages"):
        loaded(tmp_path, axes={"start": STARTS, "seed": [3]}, stages=["finetune"])


def test_runs_of_both_starts_are_trained_and_compared(tmp_path):
    sets = {**TINY["sets"], **small_data(), "stages.finetune.epochs": 1}
    study = loaded(tmp_path, axes={"epochs": [1], "start": STARTS, "seed": [3]}, sets=sets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_runner.subprocess, "Popen", warm_popen)
        assert not run_all(runs(study), study.folder, jobs=2).failed
    table = collect_study(study)
    two_stages, alone = table["runs"]
    assert [run["state"] for run in table["runs"]] == ["done", "done"]
    assert two_stages["minutes"].keys() == {"pretrain", "finetune"}
    assert alone["minutes"].keys() == {"finetune"}
    assert alone["measures"].keys() == two_stages["measures"].keys() - {"reconstruction_loss"}
    where = [str(study.path), "--out", str(study.folder), "--picture", str(tmp_path / "p.png"), "--json"]
    said = CliRunner().invoke(main.app, ["study", "crossing", *where], catch_exceptions=False)
    (setting,) = json.loads(said.stdout)["settings"]
    gain = two_stages["measures"]["top1_all"] - alone["measures"]["top1_all"]
    assert setting["top1_all"]["gain"] == pytest.approx(gain)
    assert (setting["pretrain_epochs"], setting["labels_epochs"], setting["seeds"]) == (1, alone["finetune_epochs"], 1)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert two_stages["images"] == alone["images"] != []
    (tmp_path / "kept.json").write_text(said.stdout)
    where = [str(study.path), "--out", str(tmp_path / "elsewhere"), "--kept", str(tmp_path / "kept.json"), "--json"]
    again = CliRunner().invoke(main.app, ["study", "crossing", *where], catch_exceptions=False)
    assert json.loads(again.stdout) == json.loads(said.stdout)


# --- the table and the page ---


def table(*, zero=90.0, noise=0.002, fractions=(0.25, 1.0), epochs=(30, 120, 400), seeds=(0, 1, 2)):
    """Runs that were never trained: the gain is 0 at `zero` epochs, and twice as late with a quarter of the images."""
    made = []
    for seed in seeds:
        for fraction in fractions:
            for length in epochs:
                for start in STARTS:
                    gain = 0.03 * math.log(length / (zero * (1 if fraction == 1 else 2)))
                    top1 = 0.7 + (gain + noise * math.sin(9 * seed + length) if start == "pretraining" else 0)
                    made.append({
                        "name": f"{fraction}-{length}-{start}-{seed}", "state": "done", "why": "",
                        "axes": {"data_fraction": fraction, "epochs": length, "start": start, "seed": seed},
                        "num_images": round(14_000 * fraction), "num_weights": 460_000, "pretrain_epochs": length,
                        "finetune_epochs": 20 if start == "pretraining" else 20 + length // 2,
                        "measures": {"top1_all": top1, "top1_few": top1 - 0.1},
                        "recipe": f"{fraction}, {length}, {start}, {seed}", "images": [f"{fraction} of train", "val"],
                        "minutes": {"pretrain": 6.0, "finetune": 2.0} if start == "pretraining" else {"finetune": 8.0},
                    })  # fmt: skip
    axes = {"data_fraction": list(fractions), "epochs": list(epochs), "start": STARTS, "seed": list(seeds)}
    return {"name": "when", "study": "when.yaml", "axes": axes, "runs": made}


def test_each_number_of_images_has_its_own_crossing_and_each_length_too():
    found = crossings_of(table())
    over = {(line["over"], str(line["at"])): line for line in found["lines"] if line["measure"] == "top1_all"}
    assert over["pretrain_epochs", "{'data_fraction': 1.0}"]["at_zero"] == pytest.approx(90, rel=0.1)
    assert over["pretrain_epochs", "{'data_fraction': 0.25}"]["at_zero"] == pytest.approx(180, rel=0.1)
    images = over["num_images", "{'epochs': 120}"]
    assert (images["from"], images["to"], images["num_points"]) == (3500, 14_000, 6)
    assert images["low"] < 14_000 / 4 ** math.log2(4 / 3) < images["high"]
    assert len(found["lines"]) == 2 * (2 + 3)
    text = "\n".join(results_page.crossing_lines(found))
    assert "| 0.25 | 30 | 3,500 | 30 | 35 | 3 | " in text
    assert "- all, data_fraction 1.0: the gain changes by +2.1 points with each doubling of the epochs" in text
    assert "- the 36 runs that count took 4.8 hours of training steps" in text  # 18 pairs of 16 minutes
    assert "livt study crossing when.yaml" in results_page.page([], [found])


def test_a_run_without_its_partner_is_named_and_its_seed_left_out(tmp_path):
    given_ = table()
    lost = next(run for run in given_["runs"] if run["axes"]["start"] == FROM_SCRATCH)
    lost |= {"state": "failed", "why": "it broke"}
    found = crossings_of(given_)
    assert found["missing"] == {lost["name"]: "it broke"}
    assert [row["seeds"] for row in found["settings"]].count(2) == 1
    for run in given_["runs"]:
        run |= {"state": "not run", "why": ""}
    nothing = crossings_of(given_)
    assert (nothing["settings"], nothing["lines"]) == ([], [])
    assert results_page.crossing_lines(nothing)[-1].startswith("- not run: ")
    draw_crossings(nothing, tmp_path / "p.png")
    assert (tmp_path / "p.png").is_file()


@pytest.mark.parametrize("fractions", [(0.25, 1.0), (1.0, 0.25)])
def test_a_set_without_few_shot_classes_leaves_their_cells_empty(fractions):
    given = table(fractions=fractions)
    for run in given["runs"]:
        if run["axes"]["data_fraction"] == 0.25:
            del run["measures"]["top1_few"]
    found = crossings_of(given)
    assert {(line["measure"], line["at"].get("data_fraction")) for line in found["lines"]} == {
        ("top1_all", 0.25), ("top1_all", 1.0), ("top1_all", None), ("top1_few", 1.0),
    }  # fmt: skip
    rows = [line for line in results_page.crossing_lines(found) if line.startswith("| ")][2:]
    assert len({row.count("|") for row in rows}) == 1
    assert [row.endswith("|  |  |  |  |") for row in rows] == [f == 0.25 for f in fractions for _ in range(3)]


def left_out(given, *, seeds):
    """The same study where these seeds did not run."""
    for run in given["runs"]:
        if run["axes"]["seed"] in seeds:
            run |= {"state": "not run", "why": "", "measures": {}, "images": []}
    return given


def test_runs_of_another_machine_are_counted_from_what_was_printed_there(tmp_path):
    there, here = left_out(table(), seeds=[0]), left_out(table(), seeds=[1, 2])
    (tmp_path / "when.json").write_text(json.dumps(crossings_of(there)))
    kept = results_page.read_crossings(tmp_path / "when.json")
    assert crossings_of(here, kept) == crossings_of(table())
    assert crossings_of(left_out(table(), seeds=[0, 1, 2]), kept) == crossings_of(there)


@pytest.mark.parametrize("change", ["recipe", "images", "failed"])
def test_kept_runs_of_another_recipe_or_other_images_or_that_failed_since_are_left_out(change):
    kept, here = crossings_of(table()), left_out(table(), seeds=[1, 2])
    for run in here["runs"]:
        if change == "recipe":
            run["recipe"] += ", and more epochs"
        elif change == "images" and run["state"] == "done":
            run["images"] = ["of today", "val"]
        elif change == "failed" and run["state"] == "not run":
            run |= {"state": "failed", "why": "it broke"}
    assert crossings_of(here, kept) == crossings_of(here)


def test_a_pair_of_different_images_is_named():
    given = table()
    given["runs"][0]["images"] = ["of yesterday", "val"]
    found = crossings_of(given)
    a, b = (run["name"] for run in given["runs"][:2])
    assert found["missing"] == {a: f"it read other images than {b}", b: f"it read other images than {a}"}
    assert len(found["gains"]) == len(given["runs"]) // 2 - 1


def test_a_study_without_both_starts_has_no_crossing():
    with pytest.raises(UsageError, match="does not compare pretraining with labels alone"):
        crossings_of({**table(), "axes": {"epochs": [30, 120], "seed": [0]}})


def test_the_shipped_study_is_of_the_claims_recipe_at_its_length_and_around():
    study = load_study("livt:fashion_mnist_lt/when")
    own = study.load({})
    assert own.stage("pretrain").epochs in study.study.axes.given["epochs"]
    assert set(study.study.axes.given["start"]) == set(STARTS)
    assert len(study.study.axes.given["seed"]) >= 3
