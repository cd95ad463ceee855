"""The average of the weights is the one that its formula gives, under every strategy that keeps one, and goes on.

The reference is computed in float64 from the weights of each step, read back from checkpoints: it shares no line with
the strategy.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from livt_scale import optim
from livt_scale.checkpoint.load import Position, Saver, load, read_tensors
from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Ema, Parallel, learnt_from
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.ema import WithEma, decay_at, with_ema
from livt_scale.distributed.strategy import Strategy
from livt_scale.distributed.world import World
from livt_scale.distributed.wrap import make_strategy
from livt_scale.evaluation.evaluate import evaluate
from livt_scale.train.load_trained import load_trained
from livt_scale.util.errors import RecipeError, UsageError
from tests.distributed.strategies import SMALL, Job, Kind, train_all
from tests.tiny_run import tiny_classifier, tiny_recipe, tiny_run
from tests.whole_runs import REPO

QUICKSTART = REPO / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"
DECAY = 0.6  # with warm-up: 0.1, 2/11, … and 0.6 from the eleventh update on: both parts of the rule come in
KEEPS = {"stages.finetune.ema": {"decay": 0.4}, "checkpoint.every_steps": 1, "checkpoint.keep_last": 99}


def small_strategy() -> tuple[Strategy, torch.nn.Module]:
    recipe = tiny_recipe()
    model = tiny_classifier(recipe, num_classes=4)
    model.drop_path = 0.0

    def groups(model: torch.nn.Module) -> list[dict[str, object]]:
        return optim.param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=0.75)

    strategy = make_strategy(Parallel(strategy="ddp"), model, groups, betas=(0.9, 0.99), world=World())
    return strategy, model


def one_step(strategy: Strategy, step: int, *, bad: bool = False) -> None:
    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(step))
    strategy.model.eval()  # no stochastic depth; gradients flow all the same
    loss = strategy.call(images, last=True).logsumexp(dim=1).mean()
    strategy.backward(loss * (float("nan") if bad else 1.0), last=True)
    assert strategy.update(0.01, max_norm=None).applied is not bad


def weights_of(strategy: Strategy) -> dict[str, Tensor]:
    return {n: t.double().clone() for n, t in strategy.state().items() if n.startswith("model.")}


def average_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if n.startswith("ema.") and n != "ema.updates"}


@given(updates=st.integers(0, 10**9), decay=st.floats(0.001, 0.999999), warmup=st.booleans())
def test_the_decay_grows_to_what_was_asked_for_and_never_beyond(updates: int, decay: float, warmup: bool) -> None:
    ema = Ema(decay=decay, warmup=warmup)
    assert 0 < decay_at(updates, ema) <= decay
    assert decay_at(updates, ema) <= decay_at(updates + 1, ema)
    assert decay_at(10**12, ema) == decay
    assert warmup or decay_at(updates, ema) == decay


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_the_formula_s_and_a_step_without_update_leaves_it(warmup: bool) -> None:
    inner, _ = small_strategy()
    strategy = with_ema(inner, Ema(decay=DECAY, warmup=warmup))
    expected, updates = weights_of(strategy), 0
    for step in range(15):
        bad = step in (3, 7)
        one_step(strategy, step, bad=bad)
        if not bad:
            decay = min(DECAY, (1 + updates) / (10 + updates)) if warmup else DECAY
            new = weights_of(strategy)
            expected = {n: decay * expected[n] + (1 - decay) * new[n] for n in expected}
            updates += 1
    found = strategy.state()
    assert int(found["ema.updates"]) == updates == 13
    average = average_of(found)
    assert average.keys() == {n.replace("model.", "ema.", 1) for n in expected}
    for name, tensor in average.items():
        torch.testing.assert_close(tensor.double(), expected[name.replace("ema.", "model.", 1)], rtol=0, atol=1e-6)
    moved = max(float((average[f"ema.{n[6:]}"] - w).abs().max()) for n, w in weights_of(strategy).items())
    assert moved > 1e-3  # it is not the weights themselves


def test_what_is_learnt_does_not_depend_on_it() -> None:
    (plain, _), (inner, _) = small_strategy(), small_strategy()
    averaged = with_ema(inner, Ema(decay=DECAY))
    assert with_ema(plain, None) is plain
    for step in range(3):
        one_step(plain, step)
        one_step(averaged, step)
    states = plain.state(), averaged.state()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_it_is_saved_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    ends = []
    for goes_on in (False, True):
        strategy = with_ema(small_strategy()[0], Ema(decay=DECAY))
        if goes_on:
            state = strategy.state()
            load(tmp_path / "step-00000004", into=state)
            strategy.restored(state)
        for step in range(4 if goes_on else 0, 8):
            if step == 4 and not goes_on:
                with Saver(tmp_path, mode="sync") as saver:
                    saver.save(strategy.state(), position=Position(0, 4), facts={})
            one_step(strategy, step)
        ends.append({name: tensor.clone() for name, tensor in strategy.state().items()})
    assert ends[0].keys() == ends[1].keys()
    assert [name for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])] == []


def test_the_model_answers_with_the_average_within_the_block_alone() -> None:
    inner, model = small_strategy()
    strategy = with_ema(inner, Ema(decay=DECAY))
    assert isinstance(strategy, WithEma)
    for step in range(3):
        one_step(strategy, step)
    before = {name: tensor.clone() for name, tensor in strategy.state().items()}
    other = tiny_classifier(tiny_recipe(), num_classes=4)
    other.load_state_dict({n.removeprefix("ema."): t for n, t in average_of(before).items()})
    images = torch.randn(2, 1, 28, 28)
    with torch.inference_mode():
        own, wanted = model(images), other(images)

    def fail() -> None:
        with strategy.average_in_place():
            assert torch.equal(strategy.infer(images), wanted)
            raise KeyError("an evaluation that failed")

    with pytest.raises(KeyError):
        fail()
    after = strategy.state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(strategy.infer(images), own)
    assert not torch.equal(own, wanted)


def test_it_costs_four_bytes_a_weight() -> None:
    inner, model = small_strategy()
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    before = inner.held_bytes()
    assert with_ema(inner, Ema()).held_bytes() - before == 4 * weights


def test_a_recipe_without_it_is_the_run_that_it_was_before_and_zero3_is_refused() -> None:
    assert learnt_from(load_recipe(QUICKSTART), "finetune")["stages.finetune.ema"] is None
    recipe = load_recipe(QUICKSTART, sets=["stages.finetune.ema.decay=0.99"])
    assert learnt_from(recipe, "finetune")["stages.finetune.ema.decay"] == 0.99
    with pytest.raises(RecipeError, match=r"stages.finetune.ema.*zero3.*ddp, fsdp, zero1 or zero2"):
        load_recipe(QUICKSTART, sets=["stages.finetune.ema.decay=0.99", "parallel.strategy=zero3"])


def test_asking_for_an_average_that_was_not_kept_is_an_error_that_says_how_to_keep_one(tmp_path: Path) -> None:
    tiny_run(tmp_path, tiny_recipe())
    with pytest.raises(UsageError, match=r"no average.*--set 'stages.finetune.ema"):
        load_trained(tmp_path, weights="ema")


# --- whole runs ---


def recomputed(job: Job, steps: int) -> dict[str, Tensor]:
    """The average after `steps` in float64, from the raw weights in each step's checkpoint (all but the first step's
    start, which no checkpoint has: the average of step 1 stands for it)."""
    start = read_tensors(job.checkpoint(1))
    average = {n: t.double() for n, t in average_of(start).items()}
    for done in range(1, steps):
        decay = min(0.4, (1 + done) / (10 + done))
        new = read_tensors(job.checkpoint(done + 1), choose=lambda name: name.startswith("model."))
        average = {n: decay * a + (1 - decay) * new[f"model.{n[4:]}"].double() for n, a in average.items()}
    return average


def check_runs(kinds: list[Kind], tmp_path: Path, more: dict[str, object] | None = None) -> list[Job]:
    """Each kind's average is the formula's, and one that went on half-way ends bit for bit as the unbroken one."""
    sets = {**SMALL, **KEEPS, **(more or {})}
    whole = [Job(kind, tmp_path / f"{kind.name}", "finetune", sets) for kind in kinds]
    train_all(whole, tmp_path)
    again = [Job(j.kind, tmp_path / f"{j.kind.name} again", "finetune", sets, j.checkpoint(4)) for j in whole]
    train_all(again, tmp_path)
    for job, other in zip(whole, again, strict=True):
        ended, ended_too = read_tensors(job.checkpoint(10)), read_tensors(other.checkpoint(10))
        assert ended.keys() == ended_too.keys()
        assert [n for n in ended if not torch.equal(ended[n], ended_too[n])] == []
        assert int(ended["ema.updates"]) == 10
        average = average_of(ended)
        for name, expected in recomputed(job, 10).items():
            torch.testing.assert_close(average[name].double(), expected, rtol=0, atol=1e-6)
    return whole


@pytest.mark.slow
def test_alone_and_sharded_runs_keep_it_go_on_with_it_and_evaluate_it(tmp_path: Path) -> None:
    val = REPO / "shards" / "fashion-mnist-lt" / "val"
    jobs = check_runs([Kind("ddp", 1), Kind("fsdp", 2)], tmp_path, {"data.val": str(val)})
    ends = [average_of(read_tensors(job.checkpoint(10))) for job in jobs]
    for name, tensor in ends[0].items():  # the same average, up to the order of sums
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=2e-3)
    for job in jobs:
        said = json.loads((job.run_dir / "finetune" / "eval.json").read_bytes())
        trained = load_trained(job.run_dir, weights="ema")
        report = evaluate(trained.model, ShardSet.open(val), trained.recipe, world=World())
        assert said["ema"]["top1"] == report["top1"]
        assert said["ema"] != {name: said[name] for name in said["ema"]}
        assert trained.weights["ema"] == {"decay": 0.4, "warmup": True, "tensors": len(ends[0])}


@pytest.mark.slow
def test_ddp_and_zero_on_two_ranks_keep_it_and_go_on_with_it(tmp_path: Path) -> None:
    check_runs([Kind("ddp", 2), Kind("zero1", 2), Kind("zero2", 2), Kind("zero1", 1)], tmp_path)
