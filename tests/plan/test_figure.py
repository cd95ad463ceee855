"""The picture of a plan: bars add up to the peak, hours are the plan's, and the same input gives the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from livt_scale.cli import main
from livt_scale.config.capabilities import STRATEGIES
from livt_scale.config.load import load_recipe
from livt_scale.plan.assumptions import Assumptions, accelerator
from livt_scale.plan.figure import MARK, by_strategy, draw, hours_by_gpus
from livt_scale.plan.stage_plan import best, candidates, plan_stage, spread_of
from livt_scale.plan.task import DataSet, PlanTask
from livt_scale.util.errors import UsageError
from livt_scale.util.outputs import check_output

RECIPES = Path(__file__).parents[2] / "recipes"
QUICKSTART = str(RECIPES / "fashion_mnist_lt" / "quickstart.yaml")


def tasks(path, *, gpus):
    recipe = load_recipe(RECIPES / path)
    data, kind = DataSet(115_846, 1000, 110 * 1024, "said"), accelerator("h100")
    return [PlanTask(recipe.at(s), s, data, gpus, kind.gpus_per_node, kind, Assumptions()) for s in recipe.stage_names]


def planned(task, **changes):
    how = {"micro_batch": 32, "accumulation": 1, "recompute": False, **changes}
    return plan_stage(task, spread_of(task, "fsdp", **how))


@pytest.mark.slow
def test_the_same_plan_gives_the_same_bytes_and_another_one_others(tmp_path):
    for name, gpus in (("a", 8), ("b", 8), ("c", 16)):
        draw([planned(task) for task in tasks("imagenet_lt/vit_b16.yaml", gpus=gpus)], tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c
    with Image.open(tmp_path / "a") as picture:
        assert picture.width > 1200
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20  # bars and lines, not an empty sheet


def test_the_parts_of_a_bar_are_its_peak_and_none_is_negative():
    for task in tasks("imagenet_lt/vit_h14.yaml", gpus=64):
        plans = by_strategy(planned(task, accumulation=2))
        assert [(p.spread.strategy, p.spread.recompute) for p in plans] == [
            (name, again) for name in STRATEGIES for again in (False, True)
        ]
        for plan in plans:
            peak = plan.memory.at_peak
            parts = (peak.weights, peak.grads, peak.moments, peak.computing, peak.buffers)
            assert min(parts) >= 0
            assert sum(parts) == plan.memory.peak


def test_hours_are_told_for_all_numbers_of_gpus_that_the_batches_allow():
    both = tasks("imagenet_lt/vit_b16.yaml", gpus=8)  # global batches of 4096 and, in pairs, 1024
    found = hours_by_gpus(both)
    assert [sorted(found[name]) for name in STRATEGIES] == [[2**k for k in range(10)]] * len(STRATEGIES)
    assert sorted(hours_by_gpus(both[:1])["ddp"]) == [2**k for k in range(13)]
    fastest = min(hours[8] for hours in found.values())
    assert fastest == pytest.approx(sum(best(candidates(task)).hours for task in both), rel=0.01)


def test_what_fits_nowhere_has_no_hours():
    """ViT-H's weights, gradients and moments are 9.8 GiB: on a device of 11, ddp never fits, fsdp from two on."""
    (task, _) = tasks("imagenet_lt/vit_h14.yaml", gpus=8)
    found = hours_by_gpus([replace(task, device=task.device.model_copy(update={"memory_gib": 11.0}))])
    assert set(found["ddp"].values()) == {None}
    assert found["fsdp"][1] is None
    assert None not in list(found["fsdp"].values())[1:]


def test_the_largest_micro_batch_that_fits_is_the_fastest():
    (task, _) = tasks("imagenet_lt/vit_l16.yaml", gpus=16)
    slots = 4096 // 16
    for chosen in candidates(task):
        every = [
            plan_stage(
                task,
                spread_of(
                    task, chosen.spread.strategy, micro_batch=m, accumulation=slots // m,
                    recompute=chosen.spread.recompute,
                ),
            )
            for m in range(1, slots + 1) if slots % m == 0
        ]  # fmt: skip
        assert chosen.hours == min(p.hours for p in every if p.fits)


def test_the_command_draws_beside_what_it_prints(tmp_path):
    words = ["plan", QUICKSTART, "--gpus", "2", "--images", "2478", "--classes", "10"]
    path = tmp_path / "new folder" / "plan.png"
    result = CliRunner().invoke(main.app, [*words, "--picture", str(path)], catch_exceptions=False)
    assert "pretrain " in result.stdout
    assert path.read_bytes().startswith(b"\x89PNG")
    check_output(path, marks=[MARK], command="plan", force=False)  # its own: it may replace it
    with pytest.raises(UsageError, match=r"--picture .*plan\.svg.*"):
        CliRunner().invoke(main.app, [*words, "--picture", "plan.svg"], catch_exceptions=False)
