"""Compiled blocks: how many graphs there are, and that after the first epoch, evaluation included, none is added."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from livt_scale.config.recipe import Decoder, Ema, Model, Parallel
from livt_scale.data.classes import TrainingClasses
from livt_scale.distributed import blocks
from livt_scale.distributed.strategy import Strategy
from livt_scale.distributed.world import World
from livt_scale.distributed.wrap import make_strategy
from livt_scale.evaluation.evaluate import evaluate
from livt_scale.models.classifier import build_classifier
from livt_scale.models.mae import build_mae
from livt_scale.optim import param_groups
from tests.tiny_run import tiny_recipe, tiny_shards

MICRO = Model(
    size="vit_micro", width=32, heads=2, depth=4, image_px=28, channels=1, decoder=Decoder(width=16, depth=2, heads=2)
)
CLASSES = TrainingClasses(("a", "b", "c"), (300, 50, 4), where="the training set")
BATCH = 4
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from within torch's compiler


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs made without a C++ compiler, and counted from 0."""
    monkeypatch.setattr(blocks, "BACKEND", "aot_eager")  # dynamo and autograd as with inductor, then no code
    limit = torch._dynamo.config.recompile_limit
    counters.clear()
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def compiled(model: nn.Module, *, recompute: bool) -> Strategy:
    parallel = Parallel(compile=True, activation_checkpointing=recompute)
    return make_strategy(
        parallel, model, lambda m: param_groups(m, lr=1e-3, weight_decay=0.05, layer_decay=None),
        betas=(0.9, 0.95), world=World(), ema=Ema(decay=0.9),
    )  # fmt: skip


def take_step(strategy: Strategy, numbers: int) -> None:
    images, drawn = torch.randn(BATCH, 1, 28, 28), torch.rand(BATCH, numbers)
    loss: Tensor = strategy.call(images, drawn, last=True).float().square().mean()
    strategy.backward(loss, last=True)
    strategy.update(1e-3, max_norm=1.0)


@pytest.mark.parametrize("recompute", [pytest.param(True, marks=pytest.mark.slow), False])
def test_no_graph_is_added_after_the_first_epoch_of_fine_tuning(tmp_path: Path, recompute: bool) -> None:
    shards = tiny_shards(tmp_path / "shards", {"a": 3, "b": 5, "c": 3})  # batches of 4, 4 and 3
    strategy = compiled(build_classifier(MICRO, num_classes=3, drop_path=0.2), recompute=recompute)
    after_epoch = []
    for _ in range(2):
        for _ in range(2):
            take_step(strategy, 2 * 4)
        evaluate(strategy, shards, tiny_recipe(train=shards.folder), world=World(), classes=CLASSES, batch=BATCH)
        after_epoch.append(num_graphs())
    assert after_epoch == [2, 2]  # training and evaluation; not one for each rate of drop path, none for the last batch
    assert not counters["graph_break"]
    assert not counters["unimplemented"]


def test_no_graph_is_added_after_the_first_step_of_pretraining() -> None:
    strategy = compiled(build_mae(MICRO, norm_pix=True, mask_ratio=0.75), recompute=True)
    take_step(strategy, MICRO.num_patches)
    first = num_graphs()
    assert first <= 3  # encoder, decoder, and the decoder's first block if its input has other strides
    take_step(strategy, MICRO.num_patches)
    assert num_graphs() == first


@pytest.mark.slow
def test_another_stage_forgets_the_graphs_of_the_one_before() -> None:
    for _ in range(2):
        counters.clear()
        take_step(compiled(build_classifier(MICRO, num_classes=3, drop_path=0.0), recompute=False), 2 * 4)
        assert num_graphs() == 1


def test_a_filled_up_batch_gives_the_same_report(tmp_path: Path) -> None:
    shards = tiny_shards(tmp_path / "shards", {"a": 3, "b": 5, "c": 3})
    torch.manual_seed(0)
    plain = build_classifier(MICRO, num_classes=3, drop_path=0.0)
    kept: dict[bool, list[Tensor]] = {False: [], True: []}
    reports = []
    for is_compiled, logits in kept.items():
        if is_compiled:
            blocks.prepare_blocks(plain, recompute=False, compiled=True)
        recipe = tiny_recipe(train=shards.folder)
        reports.append(evaluate(plain, shards, recipe, world=World(), classes=CLASSES, batch=BATCH, keep=logits))
    assert reports[0]["num_samples"] == reports[1]["num_samples"] == 11
    torch.testing.assert_close(torch.cat(kept[True]), torch.cat(kept[False]))
