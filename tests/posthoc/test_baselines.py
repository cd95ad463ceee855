"""Head and weight baselines against their formulas in plain NumPy, on tiny runs, and what cannot be done."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from livt_scale.cli.main import app
from livt_scale.config.recipe import Recipe
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.world import World
from livt_scale.evaluation.evaluate import evaluate
from livt_scale.evaluation.holdout import half_rows
from livt_scale.export.write_export import export_run
from livt_scale.posthoc import features
from livt_scale.posthoc.crt import Settings, retrained
from livt_scale.posthoc.soup import mean_of, read_members
from livt_scale.posthoc.tau_norm import normalised
from livt_scale.train.open_trained import load_export, open_trained
from livt_scale.util.errors import CheckpointDamaged, CheckpointMismatch, ExportError, RunError, UsageError
from tests.tiny_run import tiny_classifier, tiny_recipe, tiny_run, tiny_shards

COUNTS = {"a": 5, "b b": 4, "c'c": 3}


def livt(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture
def val(tmp_path: Path) -> ShardSet:
    return tiny_shards(tmp_path / "data of 'val'", COUNTS)


@pytest.fixture
def run_dir(tmp_path: Path, val: ShardSet) -> Path:
    folder = tmp_path / 'run of "mine"'
    recipe = tiny_recipe(train=val.folder, val=val.folder)
    tiny_run(folder, recipe, steps=(40, 60, 80), class_names=tuple(COUNTS), class_counts=(300, 50, 3))
    return folder


# --- halves and features ---


@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=60))
def test_halves_part_the_set_and_each_class(labels: list[int]) -> None:
    chosen, reported = half_rows(torch.tensor(labels).numpy())
    assert sorted([*chosen, *reported]) == list(range(len(labels)))
    for c in set(labels):
        assert abs(sum(labels[i] == c for i in chosen) - sum(labels[i] == c for i in reported)) <= 1


def test_features_through_the_head_are_the_logits_of_the_model(run_dir: Path, val: ShardSet) -> None:
    trained = open_trained(run_dir)
    outputs, logits = features.features(trained, val), features.model_outputs(trained.model, val, trained.recipe)
    with torch.inference_mode():
        torch.testing.assert_close(trained.model.head(outputs.values), logits.values)
    counted = features.figures(logits.values, logits.labels, trained.classes, trained.recipe)
    report = evaluate(trained.model, val, trained.recipe, world=World(), classes=trained.classes)
    assert counted["top1"] == report["top1"]


# --- tau-normalisation ---


@given(tau=st.floats(0, 3), seed=st.integers(0, 99))
def test_rows_are_divided_by_their_norm_to_the_tau(tau: float, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(5, 7))
    expected = np.stack([row / np.sqrt((row**2).sum()) ** tau for row in weight])
    np.testing.assert_allclose(normalised(torch.from_numpy(weight), tau).numpy(), expected, rtol=1e-12)


def test_tau_0_leaves_rows_tau_1_makes_them_unit_and_a_row_of_zeros_stays() -> None:
    weight = torch.randn(4, 6)
    weight[2] = 0
    assert torch.equal(normalised(weight, 0.0), weight)
    torch.testing.assert_close(normalised(weight, 1.0).norm(dim=1), torch.tensor([1.0, 1.0, 0.0, 1.0]))


def test_tau_is_chosen_on_one_half_and_told_of_the_other(run_dir: Path, val: ShardSet, tmp_path: Path) -> None:
    out = tmp_path / "tau"
    told = json.loads(livt("tau-norm", run_dir, "--out", out, "--tau", "0", "--tau", "0.7", "--json").stdout)
    model, info = load_export(out)
    source = open_trained(run_dir)
    assert told["tau"] == max(told["sweep"], key=lambda row: row["mean_class"])["tau"]
    torch.testing.assert_close(model.head.weight, normalised(source.model.head.weight, told["tau"]))
    assert not model.head.bias.any()
    assert info.lineage["baseline"]["method"] == "tau-norm"
    assert info.lineage["recipe_digest"] == source.weights["recipe_digest"]
    outputs = features.model_outputs(model, val, source.recipe)
    chosen, reported = half_rows(outputs.labels.numpy())
    right = (outputs.values.argmax(dim=1) == outputs.labels).numpy()
    assert told["after"]["all"] == right[reported].mean()
    accuracies = [right[[i for i in chosen if outputs.labels[i] == c]].mean() for c in range(3)]
    best = next(row["mean_class"] for row in told["sweep"] if row["tau"] == told["tau"])
    assert best == pytest.approx(np.mean(accuracies))


# --- cRT ---


def test_the_head_is_that_of_plain_sgd_on_the_same_draws() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [40, 8, 2])
    values = rng.normal(size=(50, 4)).astype(np.float32)
    values[:, 0] += labels
    settings = Settings(epochs=3, batch=10, lr=0.2, seed=1)
    head, steps = retrained(features.LabelledOutputs(torch.from_numpy(values), torch.from_numpy(labels)), 3, settings)
    assert steps == 15
    from livt_scale.config.sampling import ClassBalanced
    from livt_scale.data.order.class_balanced import ClassOrder

    order = ClassOrder(labels, 10, seed=1, steps=5, epochs=3, shares=ClassBalanced().shares)
    w, b, vw, vb = np.zeros((3, 4)), np.zeros(3), np.zeros((3, 4)), np.zeros(3)
    drawn = np.zeros(3)
    for step in range(15):
        rows = order.positions(step // 5, step % 5)
        drawn += np.bincount(labels[rows], minlength=3)
        x, z = values[rows].astype(np.float64), values[rows] @ w.T + b
        p = np.exp(z - z.max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - np.eye(3)[labels[rows]]) / 10
        vw, vb = 0.9 * vw + error.T @ x + 5e-4 * w, 0.9 * vb + error.sum(0) + 5e-4 * b
        lr = 0.2 * 10 / 256 * 0.5 * (1 + np.cos(np.pi * step / 15))
        w, b = w - lr * vw, b - lr * vb
    assert drawn.tolist() == [50, 50, 50]
    np.testing.assert_allclose(head.weight.detach().numpy(), w, atol=1e-6)
    np.testing.assert_allclose(head.bias.detach().numpy(), b, atol=1e-6)


def test_only_the_head_changes_and_the_same_command_gives_the_same_bytes(run_dir: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        told = json.loads(livt("retrain", run_dir, "--out", tmp_path / name, "--batch", "6", "--json").stdout)
    assert told["steps"] == 20
    assert told["before"] != told["after"]
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    new, old = load_export(tmp_path / "one")[0].state_dict(), open_trained(run_dir).model.state_dict()
    assert [n for n in new if not torch.equal(new[n], old[n])] == ["head.weight", "head.bias"]


def test_a_head_that_was_trained_again_is_of_cross_entropy(run_dir: Path, val: ShardSet, tmp_path: Path) -> None:
    assert open_trained(run_dir).recipe.stage("finetune").loss.name == "bal_bce"
    livt("retrain", run_dir, "--out", tmp_path / "out", "--batch", "6")
    said = livt("eval", tmp_path / "out", "--data", val.folder, "--tau", "1", "--json")
    told = json.loads(said.stdout)
    assert told["adjustment"] == {"tau": 1.0, "formula": "z - tau * log(prior)", "trained_with": "ce"}
    assert "trained on class-balanced samples" in said.stderr


# --- soups ---


def test_a_uniform_soup_is_the_mean_of_all_and_of_equals_is_itself() -> None:
    models = [tiny_classifier(tiny_recipe(), num_classes=3, seed=k) for k in range(3)]
    states = [m.state_dict() for m in models]
    for name, tensor in mean_of(models).state_dict().items():
        expected = np.mean([s[name].double().numpy() for s in states], axis=0)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(tensor, mean_of(models[::-1]).state_dict()[name])
    assert all(torch.equal(t, states[0][n]) for n, t in mean_of([models[0]] * 3).state_dict().items())


def test_greedy_keeps_what_makes_it_no_worse_by_an_independent_reckoning(
    run_dir: Path, val: ShardSet, tmp_path: Path
) -> None:
    words = ("soup", run_dir, "--all-checkpoints", "--greedy", "--out", tmp_path / "soup", "--json")
    told = json.loads(livt(*words).stdout)
    members = [open_trained(run_dir, which=str(step)) for step in (40, 60, 80)]
    labels = features.model_outputs(members[0].model, val, members[0].recipe).labels
    chosen, reported = half_rows(labels.numpy())

    def score(numbers: list[int]) -> float:
        model = mean_of([members[k].model for k in numbers])
        right = (features.model_outputs(model, val, members[0].recipe).values.argmax(1) == labels).numpy()
        return float(np.mean([right[[i for i in chosen if labels[i] == c]].mean() for c in range(3)]))

    ranked = sorted(range(3), key=lambda k: -score([k]))
    kept = ranked[:1]
    for k in ranked[1:]:
        kept = [*kept, k] if score([*kept, k]) >= score(kept) else kept
    assert [row["in"] for row in told["members"]] == [k in kept for k in range(3)]
    model, info = load_export(tmp_path / "soup")
    right = (features.model_outputs(model, val, members[0].recipe).values.argmax(1) == labels).numpy()
    assert told["after"]["all"] == right[reported].mean()
    assert info.lineage["checkpoint"] == f"soup of {len(kept)}"
    assert len(info.lineage["baseline"]["members"]) == 3


def test_exports_and_checkpoints_make_the_same_soup_as_the_run(run_dir: Path, val: ShardSet, tmp_path: Path) -> None:
    export_run(run_dir, tmp_path / "e40", which="40")
    folder = run_dir / "finetune" / "checkpoints"
    soups = {"exports": (tmp_path / "e40", run_dir), "folders": (folder / "step-00000040", folder / "step-00000080")}
    said = {name: livt("soup", *paths, "--data", val.folder, "--out", tmp_path / name) for name, paths in soups.items()}
    for member in (f"{tmp_path / 'e40'}  step-00000040  mean", f"{run_dir}  step-00000080  mean"):
        assert member in said["exports"].stdout
    assert f"{folder / 'step-00000080'}  mean" in said["folders"].stdout
    assert str(tmp_path) not in (tmp_path / "exports" / "config.json").read_text()
    a, b = (load_export(tmp_path / name)[0].state_dict() for name in soups)
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_what_cannot_be_averaged_is_said(run_dir: Path, tmp_path: Path) -> None:
    names = tuple(COUNTS)
    other, renamed = tmp_path / "other", tmp_path / "renamed"
    tiny_run(other, tiny_recipe(width=64, heads=2), class_names=names, class_counts=(300, 50, 3))
    with pytest.raises(CheckpointMismatch, match=r"cannot be averaged: model.heads: 2 in this one"):
        read_members([run_dir, other])
    tiny_run(renamed, tiny_recipe(), class_names=names[::-1], class_counts=(300, 50, 3))
    with pytest.raises(CheckpointMismatch, match=r"cannot be averaged: classes"):
        read_members([run_dir, renamed])
    tuned = tmp_path / "tuned"
    tree = tiny_recipe().model_dump()
    tree["stages"]["finetune"] |= {"train": "adaptformer", "init": "weights", "weights": "w"}
    tiny_run(tuned, Recipe.model_validate(tree), class_names=names, class_counts=(300, 50, 3))
    for paths in ([run_dir, tuned], [tuned, run_dir]):
        with pytest.raises(CheckpointMismatch, match="cannot be averaged: adapters"):
            read_members(paths)
    with pytest.raises(UsageError, match="at least two members"):
        read_members([run_dir])
    with pytest.raises(UsageError, match="neither a run nor an export"):
        read_members([run_dir, tmp_path / "gone"])
    with pytest.raises(UsageError, match="no average of the weights"):
        read_members([run_dir, run_dir], weights="ema")
    damaged = run_dir / "finetune" / "checkpoints" / "step-00000040" / "__0_0.distcp"
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw)
    with pytest.raises(CheckpointDamaged, match="SHA-256"):
        read_members([run_dir], all_checkpoints=True)


def test_a_cosine_head_is_refused(val: ShardSet, tmp_path: Path) -> None:
    tree = tiny_recipe(train=val.folder, val=val.folder).model_dump()
    tree["stages"]["finetune"] |= {"head": "cosine"}
    names = tuple(COUNTS)
    tiny_run(tmp_path / "r", Recipe.model_validate(tree), steps=(40,), class_names=names, class_counts=(3, 2, 1))
    for command in ("retrain", "tau-norm"):
        with pytest.raises(UsageError, match="not a linear layer"):
            livt(command, tmp_path / "r", "--out", tmp_path / "x")


@pytest.mark.parametrize("command", [("retrain",), ("tau-norm",), ("soup", "--all-checkpoints")])
def test_missing_and_unfinished_runs_and_foreign_targets_are_refused(
    command: tuple[str, ...], run_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises((UsageError, RunError), match=r"neither a run|no complete fine-tuning"):
        livt(*command, tmp_path / "nothing", "--out", tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(ExportError, match="holds what is not an export"):
        livt(*command, run_dir, "--out", tmp_path / "full")
    if command[0] != "soup":
        tiny_run(tmp_path / "half", tiny_recipe(), final=False)
        with pytest.raises(RunError, match="fine-tuning has not ended"):
            livt(*command, tmp_path / "half", "--out", tmp_path / "x")
        export_run(run_dir, tmp_path / "export")
        with pytest.raises(UsageError, match=r"--train|--data"):
            livt(*command, tmp_path / "export", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()
