"""DeiT-LT's distillation: its loss against NumPy, a teacher that stays as it is, runs that resume, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from livt_scale.checkpoint.load import read_tensors
from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Recipe, learnt_from
from livt_scale.data.batch import Batch
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.world import World
from livt_scale.export.write_export import export_run
from livt_scale.models.classifier import DistilledClassifier, head_of
from livt_scale.posthoc.features import features
from livt_scale.train.distill import Distillation, open_teacher, weights_digest
from livt_scale.train.finetune import finetune_task
from livt_scale.train.load_trained import load_trained
from livt_scale.train.open_trained import open_trained
from livt_scale.train.preflight import check_run
from livt_scale.train.run import train
from livt_scale.util.errors import CheckpointMismatch, RunError, UsageError
from tests.data.tiny_sets import tiny_recipe, tiny_set
from tests.tiny_run import tiny_recipe as bare_recipe
from tests.tiny_run import tiny_run
from tests.whole_runs import metrics

CNN = {"size": "resnet_micro", "image_px": 32, "channels": 3}
NAMES = ("0", "1", "2")
CPU = torch.device("cpu")
LAST = "step-00000006"  # of three epochs of two steps


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """23 images of class 0, 1 and 2: 8, 8 and 7."""
    return tiny_set(tmp_path_factory.mktemp("distill") / "set")


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a CNN of these classes, and its export beside it."""
    run = cnn_in(tmp_path_factory.mktemp("teacher") / "cnn")
    export_run(run, exported(run))
    return run


def exported(cnn: Path) -> Path:
    return cnn.with_name("export")


def cnn_in(run: Path, *, step: int = 40, final: bool = True) -> Path:
    """The run of a CNN whose weights follow from `step`."""
    tiny_run(run, bare_recipe(**CNN), steps=(step,), final=final, class_names=NAMES, class_counts=(8, 8, 7))
    return run


def recipe_of(shards: ShardSet, teacher: Path, run: Path | str = "run", **changes: Any) -> Recipe:
    finetune = {"init": "scratch", "epochs": 3, "global_batch": 8, "micro_batch": 4, "warmup_epochs": 0}
    finetune |= {"loss": {"name": "ce"}, "rand_augment": None, "distill": {"teacher": str(teacher)}}
    usual: dict[str, Any] = {"data__val": None, "model__depth": 1, "model__distillation_token": True}
    usual |= {"run_dir": str(run), "checkpoint__mode": "sync", "checkpoint__every_steps": 3}
    usual |= {"checkpoint__keep_last": 9, "stages": {"finetune": finetune}}
    return tiny_recipe(shards.folder, **{**usual, **changes})


def softmax_loss(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return -(targets * (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))).sum(axis=1)


@pytest.mark.parametrize("epoch", [1, 2])
def test_the_loss_is_the_papers_re_weighted_after_a_share_of_the_epochs(shards, cnn, epoch):
    options = {"alpha": 0.3, "reweight_after": 0.5, "beta": 0.9}  # of three epochs: from the one numbered 2 on
    changes = {f"stages__finetune__distill__{name}": value for name, value in options.items()}
    recipe = recipe_of(shards, cnn, **changes)
    counts = np.array([50, 5, 1])
    teaching = Distillation(recipe, open_trained(cnn), counts=counts, device=CPU)
    rng = np.random.default_rng(0)
    of_class, of_dist = (torch.tensor(rng.normal(size=(6, 3)), requires_grad=True) for _ in range(2))
    targets, answers = torch.tensor(rng.dirichlet((1, 1, 1), 6)), torch.tensor([0, 1, 2, 2, 1, 0])
    loss = teaching.loss((of_class, of_dist), targets, answers, epoch=epoch)

    weights = (1 - 0.9) / (1 - 0.9**counts)
    weights *= 3 / weights.sum()
    of_answer = weights[answers] if epoch >= 1.5 else np.ones(6)
    by_image = softmax_loss(of_dist.detach().numpy(), np.eye(3)[answers])
    of_targets = softmax_loss(of_class.detach().numpy(), targets.numpy())
    expected = 0.7 * of_targets.mean() + 0.3 * (of_answer * by_image).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert of_class.grad.abs().min() > 0
    assert of_dist.grad.abs().min() > 0


def test_the_teacher_is_asked_about_its_own_pixels_and_tells_no_gradient(shards, cnn):
    recipe = recipe_of(shards, cnn, data__mean=[0.1, 0.5, 0.9], data__std=[0.2, 0.3, 0.4])
    trained = open_trained(exported(cnn))
    teaching = Distillation(recipe, trained, counts=[1, 1, 1], device=CPU)
    pixels = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.data.mean, recipe.data.std))
    its_mean, its_std = (torch.tensor(v)[:, None, None] for v in (trained.recipe.data.mean, trained.recipe.data.std))
    answers = teaching.answers((pixels - mean) / std)
    expected = trained.model((pixels - its_mean) / its_std).argmax(dim=1)
    assert torch.equal(answers, expected)
    assert not any(parameter.requires_grad for parameter in teaching.teacher.parameters())


def test_the_objective_reaches_both_heads_and_leaves_the_teacher_alone(shards, cnn, tmp_path):
    task = finetune_task(recipe_of(shards, cnn), shards, run_dir=tmp_path, world=World())
    assert isinstance(task.model, DistilledClassifier)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(images, torch.tensor([0, 1, 2, 0]), list("abcd"), epoch=0, step=0, micro_index=0,
                  drop=torch.rand(4, 2))  # fmt: skip
    task.objective(task.model, batch).backward()
    gradients = {name: parameter.grad for name, parameter in task.model.named_parameters()}
    assert all(gradients[name].abs().sum() > 0 for name in ("dist_token", "head.weight", "head_dist.weight"))
    assert task.teacher == weights_digest(open_trained(exported(cnn)).model.state_dict()), "batch norm included"


def test_a_run_resumes_to_the_bit_from_wherever_its_teacher_is_and_with_no_other(shards, cnn, tmp_path):
    train(recipe_of(shards, cnn, tmp_path / "whole", stages__finetune__ema={"decay": 0.5}))
    for name in ("again", "other"):
        start = tmp_path / name / "finetune" / "checkpoints" / "step-00000003"
        shutil.copytree(tmp_path / "whole" / "finetune" / "checkpoints" / start.name, start)
    again = recipe_of(shards, exported(cnn), tmp_path / "again", stages__finetune__ema={"decay": 0.5})
    train(again)
    whole, resumed = (read_tensors(tmp_path / name / "finetune" / "checkpoints" / LAST) for name in ("whole", "again"))
    assert whole.keys() == resumed.keys() >= {"model.dist_token", "ema.head_dist.weight"}
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [line["loss"] for line in metrics(tmp_path / "again", "finetune")]

    other = cnn_in(tmp_path / "cnn", step=41)
    with pytest.raises(CheckpointMismatch, match=r"stages\.finetune\.distill\.teacher: \"[0-9a-f]+\" in the check"):
        train(recipe_of(shards, other, tmp_path / "other", stages__finetune__ema={"decay": 0.5}))

    trained, averaged = (load_trained(tmp_path / "again", weights=weights) for weights in ("raw", "ema"))
    assert features(trained, shards).values.shape == (23, 96)
    export_run(tmp_path / "again", tmp_path / "export")  # timm gives the same logits, or it would not be there
    assert not torch.equal(trained.model.head_dist.weight, averaged.model.head_dist.weight)
    with pytest.raises(UsageError, match="two heads"):
        head_of(trained.model)


@pytest.mark.parametrize(
    ("names", "changes", "says"),
    [
        ("01", {}, "knows 3 classes, and the training set has 2"),
        ("021", {}, "class 1 of the teacher .* is '1', that of the training set '2'"),
        ("012", {"model__image_px": 40}, r"takes model\.image_px 32, and the recipe has 40"),
        ("012", {"model__channels": 1, "data__mean": [0], "data__std": [1]}, r"takes model\.channels 3, .* has 1"),
    ],
)
def test_a_teacher_of_something_else_is_refused(shards, cnn, names, changes, says):
    with pytest.raises(UsageError, match=says):
        open_teacher(recipe_of(shards, exported(cnn), **changes), names)


def test_a_place_without_a_teacher_is_named_before_anything_starts(shards, cnn, tmp_path):
    [missing] = check_run(recipe_of(shards, tmp_path / "nothing", tmp_path / "run"))
    assert (missing.absent, missing.where) == (True, str(tmp_path / "nothing"))
    (tmp_path / "folder").mkdir()
    [neither] = check_run(recipe_of(shards, tmp_path / "folder", tmp_path / "run"))
    assert "neither a run nor an export" in neither.what
    assert neither.field == missing.field == "stages.finetune.distill.teacher"
    unfinished = cnn_in(tmp_path / "unfinished", final=False)
    with pytest.raises(RunError, match="has not ended"):
        open_teacher(recipe_of(shards, unfinished), NAMES)
    assert check_run(recipe_of(shards, exported(cnn), tmp_path / "run")) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stages__finetune__loss": {"name": "bal_bce"}}, "loss is 'bal_bce'"),
        ({"stages__finetune__loss": {"name": "ldam"}}, "loss is 'ldam'"),
        ({"stages__finetune__head": "cosine"}, r"stages\.finetune\.head is 'cosine'"),
        ({"model__distillation_token": False}, r"set model\.distillation_token: true"),
        ({"model__size": "resnet_micro", "model__patch_px": None}, "for our own ViTs"),
        ({"stages__finetune__init": "weights", "stages__finetune__weights": "w", "stages__finetune__keep_head": True},
         r"stages\.finetune\.keep_head is True"),
    ],
)  # fmt: skip
def test_what_two_heads_cannot_be_is_refused(shards, cnn, changes, says):
    with pytest.raises(ValidationError, match=says):
        recipe_of(shards, cnn, **changes)


def test_pretraining_does_not_depend_on_what_is_distilled_after_it(shards, cnn):
    plain = tiny_recipe(shards.folder, stages__finetune__loss={"name": "ce"})
    distill = {"model__distillation_token": True, "stages__finetune__distill": {"teacher": str(cnn)}}
    taught = tiny_recipe(shards.folder, stages__finetune__loss={"name": "ce"}, **distill)
    assert learnt_from(plain, "pretrain") == learnt_from(taught, "pretrain")


def test_distill_sets_the_token_and_a_teacher_is_looked_for_above_the_recipe_too(tmp_path, monkeypatch):
    (tmp_path / "project" / "cnn").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project" / "a.yaml").write_text("name: a\ndata: {train: t}\nstages: {finetune: {init: scratch}}\n")
    sets = ["stages.finetune.distill={teacher: cnn}", "stages.finetune.loss={name: ce}"]
    recipe = load_recipe(tmp_path / "project" / "a.yaml", sets=sets)
    assert recipe.model.distillation_token
    assert recipe.stages.finetune.distill.teacher == str((tmp_path / "project" / "cnn").resolve())
