"""Results from run directories, whole, half done and foreign; and the page that is made of them."""

import json
from pathlib import Path

import pytest

from livt_scale.checkpoint.manifest import CheckpointManifest
from livt_scale.config.load import load_recipe, to_yaml
from livt_scale.data.shard_set import ShardSet
from livt_scale.models.classifier import build_classifier
from livt_scale.study import results_figure, results_page
from livt_scale.study.claims import CLAIMS, SETTINGS, runs_of
from livt_scale.study.collect import collect, num_weights, with_kept
from livt_scale.study.runs import as_words
from livt_scale.util.errors import DataError
from tests.small_sets import small_set

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)
ARMS = [arm.name for arm in CLAIMS["losses"].arms(SETTINGS["fashion_mnist_lt"])]
PRETRAINED, TRAIN, VAL = "p" * 8, "t" * 8, "v" * 8  # digests


def sets_in(folder):
    """Sets that are not on this machine, whatever whoever runs the tests has built."""
    return {f"data.{name}": str(folder / "sets" / name) for name in ("train", "val")}


def made(folder, *, top1, val=VAL):
    """Finished runs of the claim "losses". top1: (arm, seed) to the accuracy over all; val: its digest."""
    setting = SETTINGS["fashion_mnist_lt"]
    for (arm, seed), runs in runs_of(CLAIMS["losses"], setting, seeds=SEEDS, sets=sets_in(folder)).items():
        run = runs[-1]
        stage, recipe = folder / run.name / "finetune", run.load(folder)
        stage.mkdir(parents=True)
        write(stage / "status.json", {"state": "done"})
        value = top1(arm, seed)
        write(
            stage / "eval.json",
            {
                "top1": {"all": value, "many": value, "medium": value, "few": None},
                "calibration": {"ece": 0.0625},
                "weights": {"trained_on": TRAIN, "init": {"recipe_digest": PRETRAINED}},
                "data": {"manifest_digest": val},
            },
        )
        lines = [{"step": s, "epoch": s, "top1_all": value * s / 2} for s in (1, 2)]
        (stage / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write(stage / "metrics.jsonl", {"step": 10, "step_s": 6.0})
        (folder / run.name / "recipe.yaml").write_text(to_yaml(recipe))
        lay_pretraining(folder / run.name, recipe.model_dump(mode="json"))
    return folder


def lay_pretraining(place, recipe, *, digest=PRETRAINED):
    write(place / "pretrain" / "status.json", {"state": "done"})
    write(place / "pretrain" / "metrics.jsonl", {"step": 10, "step_s": 12.0})
    facts = {"recipe": recipe, "recipe_digest": digest, "learnt_from": {"data.manifest": TRAIN}}
    told = {
        "saved_at": "2026-01-02T03:04:05+00:00", "position": {"epoch": 1, "step": 9}, "world_size": 1, "score": None,
        "final": True, "num_tensors": 1, "torch": "", "facts": facts,
        "files": [{"name": "w", "bytes": 0, "sha256": "0" * 64, "rank": 0}],
    }  # fmt: skip
    checkpoint = place / "pretrain" / "checkpoints" / "step-00000009"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "w").touch()
    (checkpoint / "manifest.json").write_bytes(CheckpointManifest.model_validate(told).to_bytes())


def write(path, told):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told))


def change(path, change):
    told = json.loads(path.read_text())
    change(told)
    write(path, told)


def results(folder):
    return collect("losses", "fashion_mnist_lt", folder, seeds=SEEDS, sets=sets_in(folder))


def test_an_arm_that_wins_with_every_seed_is_confirmed(tmp_path):
    told = results(made(tmp_path, top1=lambda arm, seed: 0.8 + 0.001 * seed if arm.startswith("bal_bce") else 0.7))
    assert told["word"] == "confirmed"
    assert told["values"]["bce"]["top1_all"] == {"0": 0.7, "1": 0.7, "2": 0.7}
    assert told["values"]["bce"]["top1_mean_over_epochs"]["0"] == pytest.approx(0.7 * 0.75)
    assert told["values"]["bce"]["ece"] == {"0": 0.0625, "1": 0.0625, "2": 0.0625}
    assert "| calibration error |" in results_page.page([told])
    assert told["minutes"]["ce"] == 1.0
    minutes = len(SEEDS) * (2 + len(ARMS))  # of one pretraining, and of each loss
    assert sum(told["run_minutes"].values()) == minutes
    number = len(SEEDS) * (1 + len(ARMS))
    hours = f"The {number} runs of these results took {minutes / 60:.1f} hours of training steps."
    assert hours in results_page.page([told, {**told, "claim": "size"}])  # a run of two claims is counted once
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


def test_a_run_that_began_with_another_pretraining_is_named(tmp_path):
    made(tmp_path, top1=lambda arm, seed: 0.7)
    longer = SETTINGS["fashion_mnist_lt"].recipe
    words = as_words({**sets_in(tmp_path), "stages.pretrain.epochs": 99})
    recipe = load_recipe(longer, sets=words).model_dump(mode="json")
    lay_pretraining(tmp_path / "bce" / "seed-0", recipe)
    change(tmp_path / "ce" / "seed-0" / "finetune" / "eval.json", lambda e: e["weights"]["init"].clear())
    other = {"recipe_digest": "another"}
    change(tmp_path / "ce" / "seed-1" / "finetune" / "eval.json", lambda e: e["weights"].update(init=other))
    (tmp_path / "ldam" / "seed-0" / "pretrain" / "status.json").unlink()
    missing = results(tmp_path)["missing"]
    assert missing["bce, seed 0"] == "its pretraining is of another recipe: stages.pretrain.epochs"
    assert missing["ce, seed 0"].startswith("what it is cannot be read")
    assert missing["ce, seed 1"] == "it did not begin with the pretraining that is beside it"
    assert "not started" in missing["ldam, seed 0"]
    assert len(missing) == 4


def test_a_run_that_read_other_images_than_the_rest_or_than_are_there_now_is_named(tmp_path):
    built = small_set(tmp_path / "built")
    made(tmp_path, top1=lambda arm, seed: 0.7, val=ShardSet.open(built).digest)
    change(tmp_path / "ce" / "seed-1" / "finetune" / "eval.json", lambda e: e["data"].update(manifest_digest="other"))
    change(tmp_path / "ce" / "seed-2" / "finetune" / "eval.json", lambda e: e["weights"].update(trained_on="other"))
    missing = results(tmp_path)["missing"]
    assert set(missing) == {"ce, seed 1", "ce, seed 2"}
    assert missing["ce, seed 1"].startswith("it read other images than bal_bce, seed 0, in ")
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "val").symlink_to(built)  # the one that was read
    assert results(tmp_path)["missing"].keys() == missing.keys()
    (tmp_path / "sets" / "train").symlink_to(built)
    assert len(results(tmp_path)["missing"]) == len(ARMS) * len(SEEDS)


def remove(folder, *runs):
    for run in runs:
        (folder / run / "finetune" / "status.json").unlink()


def test_runs_of_another_machine_are_kept_and_judged_together_with_those_of_this_one(tmp_path):
    def top1(arm, seed):
        return 0.8 + 0.001 * seed if arm.startswith("bal_bce") else 0.7

    whole = results(made(tmp_path / "whole", top1=top1))
    there, here = (made(tmp_path / name, top1=top1) for name in ("there", "here"))
    remove(there, *(f"{arm}/seed-{seed}" for arm in ("lade", "ldam") for seed in SEEDS), "bce/seed-1")
    remove(here, *(f"{arm}/seed-{seed}" for arm in ARMS if arm not in ("lade", "ldam") for seed in (0, 2)))
    kept, found = results(there), results(here)
    assert found["missing"]
    assert found["word"] != whole["word"] == "confirmed"
    both = with_kept(found, kept)
    place = {name: whole[name] for name in ("sets", "images", "budget")}  # three folders here
    assert both | place == whole
    assert list(both["values"]["bce"]["top1_all"]) == ["0", "1", "2"]
    assert with_kept(both, kept) == both


@pytest.mark.parametrize("why", ["recipe", "images"])
def test_kept_results_of_another_recipe_or_other_images_are_left_out(tmp_path, why):
    kept = results(made(tmp_path, top1=lambda arm, seed: 0.7))
    remove(tmp_path, "ce/seed-0")
    found = results(tmp_path)
    assert with_kept(found, kept)["missing"] == {}
    if why == "recipe":
        kept["recipes"]["ce"] = "another"
    else:
        kept["images"] = dict.fromkeys(kept["images"], "other")
    assert with_kept(found, kept) == found


def test_a_run_here_that_is_wrong_is_not_replaced_by_a_kept_one(tmp_path):
    kept = results(made(tmp_path, top1=lambda arm, seed: 0.7))
    (tmp_path / "ce" / "seed-1" / "finetune" / "status.json").write_text('{"state": "failed", "why": "loss is NaN"}')
    assert "loss is NaN" in with_kept(results(tmp_path), kept)["missing"]["ce, seed 1"]


def test_the_number_of_weights_is_that_of_the_classifier():
    recipe = load_recipe(SETTINGS["fashion_mnist_lt"].recipe)
    model = build_classifier(recipe.model, num_classes=10, drop_path=0.0)
    assert num_weights(recipe, num_classes=10) == sum(p.numel() for p in model.parameters())


def test_the_page_is_made_of_the_results_and_names_what_is_not_there(tmp_path):
    made(tmp_path, top1=lambda arm, seed: 0.7 + 0.01 * seed)
    (tmp_path / "bce" / "seed-0" / "finetune" / "status.json").unlink()
    for seed in SEEDS:
        (tmp_path / "lade" / f"seed-{seed}" / "finetune" / "status.json").unlink()
    told = results(tmp_path)
    text = results_page.page([told])
    assert f"| ce | {told['weights']['ce'] / 1e6:.2f} | 3 | 71.0 ± 1.0 |" in text
    assert "bce, seed 0 (not run)" in text
    assert "\nNot run: lade.\n" in text
    assert "lade, seed 0" not in text
    assert "| bal_bce above lade in top1 all |  |  |  |  | 0 |  | not run |" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| `size`")]
    assert row.count("not run") == len(SETTINGS), "a claim that nobody has run is not left out"
    assert all(f"| `livt reproduce {name} --on imagenet_lt --dry-run" in text for name in (*CLAIMS, "all"))


def test_results_are_json_that_comes_back_even_where_an_interval_is_infinite(tmp_path):
    made(tmp_path, top1=lambda arm, seed: 0.7)
    told = collect("losses", "fashion_mnist_lt", tmp_path, seeds=[0], sets=sets_in(tmp_path))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "losses.json").write_bytes(results_page.results_json(told))
    assert results_page.read_results(tmp_path / "kept") == [told]
    assert told["verdicts"][0]["low"] is None
    assert "| bal_bce above bce in top1 all | +0.0 |  |  |  | 1 |  | not decidable here |" in results_page.page([told])


def test_an_arm_that_joined_the_claim_after_the_runs_is_named_on_the_page(tmp_path):
    told = results(made(tmp_path, top1=lambda arm, seed: 0.7))
    assert "Not run:" not in results_page.page([told])
    del told["values"]["cb_bce"]
    assert "\nNot run: cb_bce.\n" in results_page.page([told])


@pytest.mark.parametrize("claim", ["losses", pytest.param("size", marks=pytest.mark.slow)])
def test_the_same_results_give_the_same_picture(tmp_path, claim):
    told = results(made(tmp_path, top1=lambda arm, seed: 0.7 + 0.01 * seed))
    if claim == "size":  # another number of weights an arm: drawn against it
        told["weights"] = {arm: 1000 * (k + 1) for k, arm in enumerate(told["weights"])}
    results_figure.draw(told, tmp_path / "p.png")
    first = (tmp_path / "p.png").read_bytes()
    results_figure.draw(told, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes() == first
    assert first.startswith(b"\x89PNG")


def test_damaged_results_are_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match=r"x\.json cannot be read: it is not JSON"):
        results_page.read_results(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"format": "livt-claim-results", "version": 1, "claim": "no", "on": ""}']
)
def test_results_of_another_kind_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match="Collect it again"):
        results_page.read_results(tmp_path)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "x.json").write_text(text)
    with pytest.raises(DataError, match="Collect it again: livt study compare"):
        results_page.read_studies(tmp_path)


def test_docs_results_is_what_its_results_make():
    kept = ROOT / "docs" / "results"
    made = results_page.page(results_page.read_results(kept), results_page.read_studies(kept))
    assert (ROOT / "docs" / "results.md").read_text() == made
