"""Results from run directories, whole, half done and foreign; and the page that is made of them."""

import json
from pathlib import Path

import pytest

from livt_scale.errors import DataError
from livt_scale.recipe_file import to_yaml
from livt_scale.study import page
from livt_scale.study.claims import CLAIMS, SETTINGS, Ask, runs_of
from livt_scale.study.collect import collect, judge

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)


def made(folder, *, top1):
    """Finished runs of the claim "losses". top1: (arm, seed) to the accuracy over all."""
    for (arm, seed), runs in runs_of(CLAIMS["losses"], SETTINGS["fashion_mnist_lt"], seeds=SEEDS, sets={}).items():
        run = runs[-1]
        stage = folder / run.name / "finetune"
        stage.mkdir(parents=True)
        value = top1(arm, seed)
        (stage / "status.json").write_text(json.dumps({"state": "done"}))
        (stage / "eval.json").write_text(
            json.dumps({"top1": {"all": value, "many": value, "medium": value, "few": None}})
        )
        lines = [{"step": s, "epoch": s, "top1_all": value * s / 2} for s in (1, 2)]
        (stage / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (stage / "metrics.jsonl").write_text(json.dumps({"step": 10, "step_s": 6.0}) + "\n")
        (folder / run.name / "recipe.yaml").write_text(to_yaml(run.load(folder)))
    return folder


def results(folder):
    return collect("losses", "fashion_mnist_lt", folder, seeds=SEEDS, sets={})


def test_an_arm_that_wins_with_every_seed_is_confirmed(tmp_path):
    told = results(made(tmp_path, top1=lambda arm, seed: 0.8 + 0.001 * seed if arm == "bal_bce" else 0.7))
    assert told["word"] == "confirmed"
    assert told["values"]["bce"]["top1_all"] == {"0": 0.7, "1": 0.7, "2": 0.7}
    assert told["values"]["bce"]["top1_mean_over_epochs"]["0"] == pytest.approx(0.7 * 0.75)
    assert told["minutes"]["ce"] == 1.0
    assert not told["missing"]


def test_a_claim_that_fails_is_reported_as_such(tmp_path):
    told = results(made(tmp_path, top1=lambda arm, seed: 0.8 if arm == "ldam" else 0.7 + 0.0001 * seed))
    assert told["word"] == "not confirmed"
    (lost,) = [v for v in told["verdicts"] if v["word"] == "not confirmed"]
    assert "ldam" in lost["says"]


def test_runs_that_are_missing_half_done_failed_or_of_another_recipe_are_named_and_not_counted(tmp_path):
    made(tmp_path, top1=lambda arm, seed: 0.7)
    (tmp_path / "bce" / "seed-0" / "finetune" / "status.json").unlink()
    (tmp_path / "ce" / "seed-1" / "finetune" / "status.json").write_text('{"state": "running", "why": ""}')
    (tmp_path / "ldam" / "seed-2" / "finetune" / "status.json").write_text('{"state": "failed", "why": "loss is NaN"}')
    foreign = tmp_path / "lade" / "seed-0" / "recipe.yaml"
    foreign.write_text(foreign.read_text().replace("layer_decay: 0.75", "layer_decay: 0.65"))
    (tmp_path / "mislas" / "seed-0" / "recipe.yaml").write_text("name: [")
    told = results(tmp_path)
    assert told["missing"]["bce, seed 0"] == "not run"
    assert told["missing"]["ce, seed 1"].startswith("running")
    assert "loss is NaN" in told["missing"]["ldam, seed 2"]
    assert "stages.finetune.layer_decay" in told["missing"]["lade, seed 0"]
    assert "cannot be read" in told["missing"]["mislas, seed 0"]
    assert len(told["missing"]) == 5
    assert "0" not in told["values"]["bce"]["top1_all"]


def test_a_lower_loss_is_the_better_one():
    values = {
        "a": {"reconstruction_loss": {0: 0.4, 1: 0.41, 2: 0.4}},
        "b": {"reconstruction_loss": {0: 0.5, 1: 0.5, 2: 0.5}},
    }
    assert judge(Ask("a", "b", "reconstruction_loss"), values).word == "confirmed"
    assert judge(Ask("b", "a", "reconstruction_loss"), values).word == "not confirmed"
    assert judge(Ask("a", "b", "reconstruction_loss", within=0.05), values).word == "not confirmed"
    assert judge(Ask("a", "b", "reconstruction_loss", within=0.5), values).word == "confirmed"


def test_the_page_is_made_of_the_results_and_names_what_is_not_there(tmp_path):
    made(tmp_path, top1=lambda arm, seed: 0.7 + 0.01 * seed)
    (tmp_path / "bce" / "seed-0" / "finetune" / "status.json").unlink()
    told = results(tmp_path)
    text = page.page([told])
    assert "| ce | 3 | 71.0 ± 1.0 |" in text
    assert "bce, seed 0 (not run)" in text
    page.picture(told, tmp_path / "p.png")
    first = (tmp_path / "p.png").read_bytes()
    page.picture(told, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes() == first, "the same results give the same bytes"


def test_damaged_results_are_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match=r"x\.json is not JSON"):
        page.read_results(tmp_path)


def test_docs_results_is_what_its_results_make():
    assert (ROOT / "docs" / "results.md").read_text() == page.page(page.read_results(ROOT / "docs" / "results"))
