"""Cached features, k-NN and probes of them against scikit-learn, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from typer.testing import CliRunner, Result

from livt_scale.cli.main import app
from livt_scale.data.shard_set import ShardSet
from livt_scale.export.write_export import export_run
from livt_scale.posthoc import features
from livt_scale.posthoc.feature_set import FeatureSet, backbone_of
from livt_scale.posthoc.knn import votes
from livt_scale.posthoc.probe import ProbeSettings, fitted
from livt_scale.train.open_trained import open_trained
from livt_scale.util.errors import DataError, UsageError
from tests.tiny_run import tiny_recipe, tiny_run, tiny_shards
from tests.whole_runs import Livt

COUNTS = {"a": 9, "b b": 4, "c'c": 3}


def livt(*args: str | Path | int) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run, its two sets, and the features of both."""
    folder = tmp_path_factory.mktemp("features 'x'")
    train, val = tiny_shards(folder / "t", COUNTS), tiny_shards(folder / "v", dict.fromkeys(COUNTS, 2))
    assert train.digest != val.digest
    recipe = tiny_recipe(train=train.folder, val=val.folder)
    tiny_run(folder / "run", recipe, steps=(40,), class_names=tuple(COUNTS), class_counts=tuple(COUNTS.values()))
    for name, shards in (("train", train), ("val", val)):
        livt("features", folder / "run", "--data", shards.folder, "--out", folder / name)
    paths = {"run": folder / "run", "train": folder / "train", "val": folder / "val"}
    return paths | {"train shards": train.folder, "val shards": val.folder}


def test_the_file_holds_what_the_head_is_given(made: dict[str, Path]) -> None:
    found, trained = FeatureSet.read(made["val"]), open_trained(made["run"])
    outputs = features.features(trained, ShardSet.open(made["val shards"]))
    assert torch.equal(found.features, outputs.values)
    assert torch.equal(found.labels, outputs.labels)
    assert found.facts.weights == trained.weights
    assert found.facts.class_names == tuple(COUNTS)
    with safe_open(made["val"] / "features.safetensors", framework="pt") as opened:
        keys = json.loads(opened.get_tensor("keys").numpy().tobytes())
    assert tuple(keys) == found.keys


@pytest.mark.slow
def test_two_ranks_write_the_rows_of_one(made: dict[str, Path], tmp_path: Path) -> None:
    words = ("features", str(made["run"]), "--data", str(made["train shards"]), "--out", str(tmp_path / "two"))
    Livt(tmp_path).run(*words, processes=2)
    alone, together = FeatureSet.read(made["train"]), FeatureSet.read(tmp_path / "two")
    torch.testing.assert_close(together.features, alone.features, rtol=0, atol=1e-5)
    assert (together.keys, together.labels.tolist()) == (alone.keys, alone.labels.tolist())


@pytest.mark.parametrize("k", [1, 7, 40])
def test_votes_are_those_of_scikit_learn(k: int) -> None:
    rng = np.random.default_rng(k)
    train, queries = (rng.normal(size=(n, 6)).astype(np.float32) for n in (40, 15))
    labels = rng.integers(0, 5, 40)
    unit = [x / np.linalg.norm(x, axis=1)[:, None] for x in (train, queries)]
    # of unit vectors the squared distance is 2 - 2 · similarity
    model = KNeighborsClassifier(n_neighbors=k, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)).fit(unit[0], labels)
    expected = np.zeros((15, 5))
    expected[:, model.classes_] = model.predict_proba(unit[1])
    args = torch.from_numpy(train), torch.from_numpy(labels), torch.from_numpy(queries)
    np.testing.assert_allclose(votes(*args, num_classes=5, k=k).numpy(), expected, atol=1e-5)


def test_knn_and_probe_report_accuracy_by_group(made: dict[str, Path]) -> None:
    train, val = FeatureSet.read(made["train"]), FeatureSet.read(made["val"])
    told = json.loads(livt("knn", made["train"], made["val"], "--k", 3, "--json").stdout)
    shares = votes(train.features, train.labels, val.features, num_classes=3, k=3)
    assert told["top1"]["all"] == (shares.argmax(1) == val.labels).double().mean().item()
    assert [row["train_images"] for row in told["per_class"]] == list(COUNTS.values())
    probe = json.loads(livt("probe", made["train"], made["val"], "--loss", "bal_ce", "--json").stdout)
    assert probe["converged"]
    assert probe["num_samples"] == 6
    assert "6 evaluation images" in livt("probe", made["train"], made["val"]).stdout


def test_a_probe_is_scikit_learns_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [40, 12, 8])
    values = rng.normal(size=(60, 4)).astype(np.float32)
    values[:, 0] += labels
    expected = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(values, labels)
    x, y = torch.from_numpy(values), torch.from_numpy(labels)
    head, converged = fitted(x, y, num_classes=3, settings=ProbeSettings())
    assert converged
    np.testing.assert_allclose(head(x).softmax(1).numpy(), expected.predict_proba(values), atol=1e-3)


def test_a_run_and_its_export_have_comparable_features_and_a_backbone_has_others(
    made: dict[str, Path], tmp_path: Path
) -> None:
    export_run(made["run"], tmp_path / "export")
    livt("features", tmp_path / "export", "--data", made["val shards"], "--out", tmp_path / "of export")
    assert livt("knn", made["train"], tmp_path / "of export", "--k", 3).exit_code == 0
    recipe = tiny_recipe(train=made["train shards"])
    tree = recipe.model_dump()
    tree["stages"]["finetune"] |= {"init": "weights", "weights": str(tmp_path / "export")}
    backbone = backbone_of(type(recipe).model_validate(tree), ShardSet.open(made["val shards"]))
    blocks = open_trained(made["run"]).model.blocks[0].state_dict()
    assert all(torch.equal(tensor, blocks[name]) for name, tensor in backbone.model.blocks[0].state_dict().items())
    with pytest.raises(UsageError, match="random network"):
        backbone_of(recipe, ShardSet.open(made["val shards"]))


def test_other_weights_the_same_images_and_damaged_files_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="same images"):
        livt("knn", made["train"], made["train"])
    with pytest.raises(UsageError, match=r"k is 20, and .* has 16 images"):
        livt("knn", made["train"], made["val"])
    with pytest.raises(UsageError, match="is there already"):
        livt("features", made["run"], "--data", made["val shards"], "--out", made["val"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_text("keep")
    with pytest.raises(UsageError, match=r"photo\.png"):
        livt("features", made["run"], "--data", made["val shards"], "--out", tmp_path / "mine", "--force")
    with pytest.raises(DataError, match="holds no features"):
        FeatureSet.read(tmp_path / "mine")
    livt("features", made["run"], "--data", made["val shards"], "--out", tmp_path / "cut")
    manifest = json.loads((tmp_path / "cut" / "manifest.json").read_text())
    (tmp_path / "cut" / "manifest.json").write_text(json.dumps({**manifest, "weights": {"run": "another"}}))
    with pytest.raises(DataError, match="differ in weights"):
        livt("knn", made["train"], tmp_path / "cut")
    file = tmp_path / "cut" / "features.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="cut or changed"):
        FeatureSet.read(tmp_path / "cut")
