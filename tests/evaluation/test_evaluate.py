"""Evaluation counts each sample once at any world size, says what it is about, and fails on all ranks alike."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from livt_scale.api.eval_loader import EvalLoader
from livt_scale.api.eval_loader import evaluate as plain_evaluate
from livt_scale.config.recipe import Parallel, Recipe
from livt_scale.data.classes import TrainingClasses
from livt_scale.data.loader import eval_batches, normalise
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.strategy import Strategy
from livt_scale.distributed.world import World, process_group
from livt_scale.distributed.wrap import make_strategy
from livt_scale.evaluation import evaluate as evaluation
from livt_scale.evaluation.evaluate import evaluate, write_eval
from livt_scale.util.errors import DataError, RunError, SampleError
from tests import warm
from tests.tiny_run import tiny_recipe, tiny_shards
from tests.whole_runs import free_port

CLASSES = TrainingClasses(("a", "b", "c"), (300, 50, 4), where="the training set")


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return tiny_shards(tmp_path / 'a set\'s "shards"', {"a": 3, "b": 5, "c": 3})


def a_model() -> nn.Module:
    """Logits that differ from image to image, as those of a transformer with random weights do not."""
    weight = torch.randn(3, 28 * 28, generator=torch.Generator().manual_seed(3))
    # in training mode the dropout would leave nothing of an image
    model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 3), nn.Dropout(0.99))
    model[1].load_state_dict({"weight": weight, "bias": torch.zeros(3)})
    return model


def reference_top1(shards: ShardSet, recipe: Recipe) -> tuple[float, dict[int, float]]:
    """Accuracy over all and by class, image by image."""
    model = a_model().eval()
    right: dict[int, list[bool]] = {0: [], 1: [], 2: []}
    for batch in eval_batches(shards, recipe, rank=0, world_size=1, batch=1):
        images = normalise(batch.images, recipe.data.mean, recipe.data.std, torch.float32)
        with torch.no_grad():
            right[int(batch.labels)].append(int(model(images).argmax()) == int(batch.labels))
    flat = [r for rows in right.values() for r in rows]
    return float(np.mean(flat)), {c: float(np.mean(rows)) for c, rows in right.items()}


def test_one_process_gives_what_counting_by_hand_gives(shards: ShardSet) -> None:
    recipe = tiny_recipe(train=shards.folder)
    model = a_model().train()
    report = evaluate(model, shards, recipe, world=World(), classes=CLASSES, batch=4)
    overall, by_class = reference_top1(shards, recipe)
    assert report["num_samples"] == 11
    assert report["top1"]["all"] == overall
    assert [c["top1"] for c in report["per_class"]] == [by_class[c] for c in range(3)]
    assert {g: report["top1"][g] for g in ("many", "medium", "few")} == {
        "many": by_class[0],
        "medium": by_class[1],
        "few": by_class[2],
    }
    assert report["top5"]["all"] == 1.0
    assert np.array(report["confusion"]).sum() == 11
    assert 0 <= report["calibration"]["ece"] <= 1
    assert model.training


def _sharded(world: World) -> Strategy:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(model.parameters()), "lr_scale": 1.0}]

    return make_strategy(Parallel(strategy="fsdp"), a_model(), groups, betas=(0.9, 0.95), world=world)


def _cut(batches: Callable[..., Any], *, after: int) -> Callable[..., Any]:
    """`evaluation_batches` of a set whose sample `after` is broken."""

    @contextmanager
    def cut(*args: Any, **named: Any) -> Iterator[Iterator[Any]]:
        def until_broken(whole: Iterator[Any]) -> Iterator[Any]:
            yield from islice(whole, after)
            raise SampleError("this image is broken")

        with batches(*args, **named) as whole:
            yield until_broken(iter(whole))

    return cut


def _rank(rank: int, port: str, folder: str, out: str) -> None:
    """One of two ranks: an evaluation, then one in which rank 1 fails; the same with the model sharded over both."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    shards, recipe, world, model = ShardSet.open(folder), tiny_recipe(train=folder), World(rank, 2), a_model()

    def fail(*_: object) -> None:
        raise SampleError("this image is broken")

    with process_group(world, timeout_s=60):
        options = {"world": world, "classes": CLASSES, "batch": 1}
        result = {"report": evaluate(model, shards, recipe, **options), "error": ""}
        if rank == 1:
            model.register_forward_pre_hook(fail)
        try:
            evaluate(model, shards, recipe, world=world, classes=CLASSES, batch=1)
        except SampleError as error:
            result["error"] = str(error)
        sharded = _sharded(world)
        result["sharded"] = {"report": evaluate(sharded, shards, recipe, **options), "error": ""}
        loader = EvalLoader(shards, batch=1, image_px=28, channels=1, mean=[0.3], std=[0.25], workers=0)
        result["api"] = plain_evaluate(fully_shard(a_model()), loader, shards)  # ranks with 6 and 5 batches
        if rank == 1:
            evaluation.evaluation_batches = _cut(evaluation.evaluation_batches, after=2)
        try:
            evaluate(sharded, shards, recipe, **options)
        except SampleError as error:
            result["sharded"]["error"] = str(error)
        dist.barrier()
    Path(out, f"{rank}.json").write_text(json.dumps(result))


def test_two_ranks_give_the_report_of_one_process_and_fail_together(shards: ShardSet, tmp_path: Path) -> None:
    recipe = tiny_recipe(train=shards.folder)
    alone = evaluate(a_model(), shards, recipe, world=World(), classes=CLASSES, batch=1)
    assert 0 < alone["top1"]["all"] < 1
    # 11 samples: 6 and 5 batches of one.
    code = "import sys; from tests.evaluation.test_evaluate import _rank; _rank(int(sys.argv[1]), *sys.argv[2:])"
    words = (str(free_port()), shards.folder, tmp_path)
    warm.run_each([["-c", code, str(rank), *words] for rank in range(2)], log=tmp_path / "log")
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        for told in (result, result["sharded"]):
            assert told["report"] == json.loads(json.dumps(alone))
            assert told["error"].endswith("this image is broken")
        assert result["api"]["confusion"] == alone["confusion"]


def test_more_ranks_than_samples_count_each_once(shards: ShardSet) -> None:
    recipe = tiny_recipe(train=shards.folder)
    for world_size in (1, 2, 3, 10, 11, 12, 40):
        seen: list[str] = []
        for rank in range(world_size):
            with eval_batches(shards, recipe, rank=rank, world_size=world_size, batch=2) as batches:
                seen += [key for batch in batches for key in batch.keys]
        assert sorted(seen) == sorted(shards.keys(np.arange(11)))


def test_lost_samples_are_an_error_not_a_lower_score(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(train=shards.folder)
    whole = evaluation.evaluation_batches
    monkeypatch.setattr(evaluation, "evaluation_batches", lambda *a, **k: whole(*a, **(k | {"world_size": 2})))
    with pytest.raises(RunError, match="5 samples counted of 11"):
        evaluate(a_model(), shards, recipe, world=World(), classes=CLASSES)


def test_classes_that_differ_from_training_are_named_with_both_sets(shards: ShardSet) -> None:
    for names, message in (
        (("a", "b", "d"), r"only in the first: 'c'; only in the second: 'd'"),
        (("a", "b"), r"3 against 2; only in the first: 'c'; only in the second: none"),
        (("b", "a", "c"), r"another order: class 0 is 'a' against 'b'"),
    ):
        other = TrainingClasses(names, (1,) * len(names), where="/data/the training set")
        with pytest.raises(DataError, match=message) as caught:
            evaluation.check_same_classes(shards, other)
        assert str(shards.folder) in str(caught.value)
        assert "/data/the training set" in str(caught.value)


def test_groups_come_from_the_training_set_of_the_recipe(shards: ShardSet, tmp_path: Path) -> None:
    train = tiny_shards(tmp_path / "train", {"a": 30, "b": 2, "c": 1})
    recipe = tiny_recipe(train=train.folder)
    model = a_model()
    report = evaluate(model, shards, recipe, world=World())
    assert [c["train_images"] for c in report["per_class"]] == [30, 2, 1]
    assert report["top1"]["many"] is None  # 30 is not over 100
    assert report["data"]["manifest_digest"] == shards.digest != train.digest


def test_eval_json_holds_the_report_and_the_lineage_and_is_never_half(shards: ShardSet, tmp_path: Path) -> None:
    recipe = tiny_recipe(train=shards.folder)
    report = evaluate(a_model(), shards, recipe, world=World(), classes=CLASSES)
    facts = {"stage": "finetune", "recipe_digest": "ab", "run": "aa", "learnt_from": {"data.manifest": "cd"}}
    weights = evaluation.weights_lineage(facts, step=40, epoch=2, checkpoint="step-00000040")
    path = tmp_path / "a run's" / "finetune" / "eval.json"
    write_eval(report, path, weights=weights)
    saved = json.loads(path.read_text())
    assert set(saved["top1"]) >= {"all", "many", "medium", "few"}
    assert saved["data"] == {
        "name": "set",
        "folder": str(shards.folder),
        "manifest_digest": shards.digest,
        "num_samples": 11,
    }
    assert saved["weights"] == {
        "run": "aa",
        "stage": "finetune",
        "checkpoint": "step-00000040",
        "position": {"epoch": 2, "step": 40},
        "recipe_digest": "ab",
        "trained_on": "cd",
        "init": None,
    }
    with pytest.raises(ValueError, match="JSON"):
        write_eval({**report, "loss": float("nan")}, path, weights=weights)
    assert json.loads(path.read_text()) == saved
    assert list(path.parent.iterdir()) == [path]
