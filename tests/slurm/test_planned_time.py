"""The time of a stage before its first step: planned for the devices that a partition's profile names."""

from __future__ import annotations

from pathlib import Path

import pytest

from livt_scale.config.load import load_recipe
from livt_scale.slurm.chain import plan_chain
from livt_scale.slurm.planned_time import planned_time
from livt_scale.slurm.sites import Resources, load_site, resources_for, with_site
from livt_scale.slurm.step_times import Measured

VIT_B = Path(__file__).parents[2] / "recipes" / "imagenet_lt" / "vit_b16.yaml"  # no shards: the set's published size
NODE = Resources(1, 8, 8, 12, 600, None, device="h100")


def recipe(*sets):
    return load_recipe(VIT_B, sets=["slurm.account=a", *sets])


def test_a_stage_is_planned_at_the_high_end_and_fewer_gpus_take_longer():
    one, two = (planned_time(recipe(), "pretrain", Resources(n, 8, 8, 12, 600, None, device="h100")) for n in (1, 2))
    assert one.steps == two.steps == 115_846 // 4096 * 800
    assert one.step_s > two.step_s > 0
    assert "h on 16 x h100" in two.about


@pytest.mark.parametrize(
    "asked",
    [
        Resources(1, 8, 8, 12, 600, None),
        Resources(1, 8, 8, 12, 600, None, device="quantum"),
        Resources(1, 2, 0, 12, 600, None, device="h100"),
        Resources(1, 7, 7, 12, 600, None, device="h100"),  # 4096 slots are not divided by 7
    ],
)
def test_what_cannot_be_planned_has_no_time(asked):
    assert planned_time(recipe(), "pretrain", asked) is None


def test_a_first_chain_has_as_many_jobs_as_the_plans_high_end_needs_and_notes_why():
    site = load_site("a100_slingshot")
    run = recipe("slurm.nodes=1", "parallel.compile=true", "slurm.time_min=60")
    run = run.model_copy(update={"slurm": with_site(run.slurm, site)})
    assert resources_for(run.slurm, site, "pretrain").device == "a100-40gb"
    nothing = {stage: Measured() for stage in run.stage_names}
    blind = plan_chain(run, site, None, nothing)
    chain = plan_chain(run, site, None, nothing, planned=planned_time)
    guess = planned_time(run, "pretrain", resources_for(run.slurm, site, "pretrain"))
    of_pretrain = [job for job in chain.jobs if job.job == "pretrain"]
    assert len([job for job in blind.jobs if job.job == "pretrain"]) == 2
    assert len(of_pretrain) >= guess.steps * guess.step_s / 3600
    assert any("planned, at the high end" in note for note in chain.notes)
    measured = {stage: Measured(total=100, step_s=1.0, world_size=4) for stage in run.stage_names}
    assert not any("livt plan" in note for note in plan_chain(run, site, None, measured, planned=planned_time).notes)
