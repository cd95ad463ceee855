"""Every strategy follows one loss curve, and goes on from every other's checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from livt_scale.checkpoint.load import read_tensors
from tests.distributed.strategies import SMALL, Job, Kind, train_all

Runs = dict[tuple[str, Kind], Job]
SIX_STEPS = {**SMALL, "stages.*.global_batch": 120, "stages.*.micro_batch": 30, "checkpoint.every_steps": 3}
SINGLE = Kind("ddp", 1)
FSDP, COPIES, FOREACH = (
    Kind("fsdp", 2),
    Kind("fsdp", 4, options=(("shard_within", "node"),), local=2),
    Kind("ddp", 2, options=(("adamw", "foreach"),)),
)
LOW = [Kind("fsdp", 2, "bf16"), Kind("fsdp", 2, "fp16"), Kind("ddp", 1, "fp16")]
RARE_OPTIONS = ("activation_checkpointing", "true"), ("offload", "cpu")
OFTEN = [
    *(("pretrain", kind) for kind in (FSDP, COPIES, *LOW[:2])),
    ("finetune", FSDP),
]
RARELY = [
    *(("pretrain", kind) for kind in (FOREACH, LOW[2], *(Kind("fsdp", 2, options=(o,)) for o in RARE_OPTIONS))),
    *(("finetune", kind) for kind in (COPIES, LOW[0])),
]
EACH = [*OFTEN, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in RARELY)]


class TrainedRuns(Runs):
    """Six steps of a small model by each kind; those of the slow tests are trained when one is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __missing__(self, pair: tuple[str, Kind]) -> Job:
        pairs = RARELY if pair in RARELY else [("pretrain", SINGLE), ("finetune", SINGLE), *OFTEN]
        jobs = {(stage, kind): Job(kind, self._folder / stage / kind.name, stage, SIX_STEPS) for stage, kind in pairs}
        train_all(list(jobs.values()), self._folder)
        self.update(jobs)
        return jobs[pair]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return TrainedRuns(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(("stage", "kind"), EACH, ids=lambda value: getattr(value, "name", value))
def test_losses_and_norms_are_those_of_one_process(runs: Runs, stage: str, kind: Kind) -> None:
    ours, alone = runs[stage, kind], runs[stage, SINGLE]
    assert len(alone.losses) == 6
    near = 1e-4 if kind.precision == "fp32" else 2e-2
    assert ours.losses == pytest.approx(alone.losses, rel=near)
    assert ours.norms == pytest.approx(alone.norms, rel=10 * near)
    assert kind.precision == "fp32" or ours.losses != alone.losses  # or it was not in low precision at all


@pytest.mark.parametrize(("stage", "kind"), EACH, ids=lambda value: getattr(value, "name", value))
def test_all_save_the_same_names_in_full_precision(runs: Runs, stage: str, kind: Kind) -> None:
    ours, alone = (read_tensors(runs[stage, k].checkpoint(6)) for k in (kind, SINGLE))
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in alone.items()}
    if kind.precision == "fp32":
        for name in (name for name in alone if name.endswith("exp_avg")):  # a key's bias has no gradient but rounding
            off = (ours[name] - alone[name]).norm() / (alone[name].norm() + 1e-6)
            assert off < 1e-2, name


def test_each_goes_on_from_anothers_checkpoint(runs: Runs, tmp_path: Path) -> None:
    pairs = [(FSDP, SINGLE), (SINGLE, FSDP), (COPIES, FSDP)]
    jobs = [
        Job(to, tmp_path / f"{saved.name}-{to.name}", "pretrain", SIX_STEPS, runs["pretrain", saved].checkpoint(3))
        for saved, to in pairs
    ]
    train_all(jobs, tmp_path)
    for job in jobs:
        assert job.losses == pytest.approx(runs["pretrain", SINGLE].losses[3:], rel=1e-4), job.run_dir.name


def test_the_same_strategy_goes_on_bit_for_bit(runs: Runs, tmp_path: Path) -> None:
    unbroken = [runs["pretrain", LOW[1]], runs["finetune", FSDP]]
    jobs = [
        replace(run, run_dir=tmp_path / run.stage / run.kind.name, goes_on_from=run.checkpoint(3)) for run in unbroken
    ]
    train_all(jobs, tmp_path)
    for run, job in zip(unbroken, jobs, strict=True):
        assert job.losses == run.losses[3:], run.kind.name
        ours, whole = read_tensors(job.checkpoint(6)), read_tensors(run.checkpoint(6))
        assert all(torch.equal(ours[name], tensor) for name, tensor in whole.items()), run.kind.name
