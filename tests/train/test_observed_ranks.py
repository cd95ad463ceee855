"""A fine-tuning run of two ranks, one of them slow: its forks, its loader processes, and who is named as slow."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from statistics import median, mode
from typing import Any

import pytest

from livt_scale.train.run_files import LOG
from tests import warm
from tests.train import observed_ranks
from tests.whole_runs import TINY, Livt, metrics, small_data, spelt

SETS = {
    **TINY,
    "stages.finetune.init": "scratch",
    "stages.finetune.eval_every_epochs": 1,
    "model.depth": 1,
    "checkpoint.every_steps": 18,
}


@dataclass(frozen=True)
class Observed:
    ranks: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    log: str


@pytest.fixture(scope="module")
def observed(tmp_path_factory) -> Observed:
    folder = tmp_path_factory.mktemp("observed")
    sets = {**SETS, **small_data(), "run_dir": folder / "run"}
    words = [f"{name}={spelt(value)}" for name, value in sets.items()]
    recipe = Livt(folder).recipe
    warm.run([observed_ranks.__file__, recipe, folder, *words], ranks=2, cwd=folder, check=True, timeout=300)
    return Observed(
        [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)],
        metrics(folder / "run", "finetune"),
        (folder / "run" / LOG).read_text(),
    )


def test_no_process_is_forked_once_the_process_group_is_up(observed):
    """The one fork is that of the server, from which the loader processes come."""
    assert [rank["forks"] for rank in observed.ranks] == [[False]] * 2


def test_the_processes_of_the_evaluation_are_kept_until_the_end_of_the_stage(observed):
    for rank in observed.ranks:
        first, second = rank["evaluations"]
        assert len(set(first) & set(second)) == 2  # one that loads training images, one for the evaluation
        assert not rank["left"]


def test_a_slow_rank_and_its_host_are_named_and_the_rank_that_waits_for_it_is_not(observed):
    slow, slow_s, host = observed_ranks.SLOW_RANK, observed_ranks.SLOW_S, socket.gethostname()
    assert len(observed.lines) == 18
    assert all(line["rank_max_s"] >= slow_s for line in observed.lines)
    # A busy machine may hold up the other one in some steps.
    assert mode((line["slowest_rank"], line["slowest_host"]) for line in observed.lines) == (slow, host)
    assert median(line["rank_max_s"] - line["rank_median_s"] for line in observed.lines) > 0.5 * slow_s
    warned = [line for line in observed.log.splitlines() if "all ranks wait for" in line]
    assert warned
    assert all(f"rank {slow} on {host}" in line for line in warned)
