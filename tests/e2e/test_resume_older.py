"""A run that was stopped in mid-stage by an earlier version is resumed by this one, and learns what it would have.

The stored run directory was written at commit 7d37c38, before recipe fields were renamed, by

    livt train recipes/fashion_mnist_lt/quickstart.yaml --set …(as SETS)     stopped by SIGTERM after step 4 of 8

and `unbroken-losses.json` has the losses of the same run, not stopped, at that commit. On the machine that wrote them
the resumed losses, weights, moments and averages were equal bit for bit; other CPUs round differently.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from tests.whole_runs import REPO, Livt, metrics

pytestmark = pytest.mark.slow
STORED = Path(__file__).parents[1] / "golden" / "saved-7d37c38" / "mid-pretrain.tar.gz"
SHIPPED = REPO / "shards" / "fashion-mnist-lt"
SETS = {
    "data.train": SHIPPED / "train-lt",
    "data.val": SHIPPED / "val",
    "name": "written-at-7d37c38",
    "model.width": 8,
    "model.depth": 1,
    "model.heads": 2,
    "model.decoder.width": 8,
    "model.decoder.depth": 1,
    "model.decoder.heads": 2,
    "stages.*.global_batch": 512,
    "stages.*.micro_batch": 256,
    "stages.finetune.ema.decay": 0.9,
    "checkpoint.mode": "sync",
    "checkpoint.keep_last": 1,
    "log.num_reconstructions": 0,
    "data.workers": 0,
}


def test_a_run_stopped_by_an_earlier_version_learns_what_it_would_have(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with tarfile.open(STORED) as stored:
        stored.extractall(run, filter="data")
    unbroken = json.loads((run / "unbroken-losses.json").read_text())
    before = [line["loss"] for line in metrics(run, "pretrain")]
    assert before == unbroken["pretrain"][:4]

    said = Livt(tmp_path).train(run, **SETS)

    assert "pretrain: resumed from step-00000004" in said
    for stage, losses in unbroken.items():
        assert [line["loss"] for line in metrics(run, stage)] == pytest.approx(losses, rel=1e-4), stage
