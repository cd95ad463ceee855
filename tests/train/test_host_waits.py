"""Where the host waits for a GPU, on a device that pretends to be one: nowhere in an ordinary step."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests import pretend_cuda, warm
from tests.whole_runs import REPO, Livt

SETS = {
    "parallel__precision": "bf16",
    "stages__finetune__mixup": 0.8,
    "stages__finetune__cutmix": 1.0,
    "stages__finetune__ema__decay": 0.9,
    "stages__*__epochs": 1,
    "stages__*__warmup_epochs": 0,
    "model__depth": 1,
    "log__every_steps": 9,  # of 9
    "checkpoint__every_steps": 6,
    "checkpoint__mode": "async",
    "data__workers": 0,
}
ONCE = {"data/normalise.py": 2, "losses/formulas.py": 1}  # mean and deviation of a stage, margins of a loss
MODEL = {"distributed/ddp.py"}  # a parameter at a time
SAVES = {"checkpoint/dcp.py", "evaluation/pictures.py", "train/pretrain.py"}
EVALUATES = {"evaluation/evaluate.py", "metrics.py"}


def livt(report, *words) -> Counter[str]:
    """How often `livt WORDS` waits, by the file of the package that does."""
    warm.run([pretend_cuda.__file__, report, *words], cwd=REPO, check=True)
    counts: Counter[str] = Counter()
    for _, where, count in json.loads(report.read_text()):
        counts[where.rpartition(":")[0]] += count
    return counts


def test_no_operation_mixes_devices_and_an_ordinary_step_waits_nowhere(tmp_path):
    waits = livt(tmp_path / "waits.json", *Livt(tmp_path).train_words(tmp_path / "run", **SETS))
    assert set(waits) == set(ONCE) | MODEL | SAVES | EVALUATES
    assert {name: waits[name] for name in ONCE} == ONCE


@pytest.mark.slow
def test_an_evaluation_waits_for_its_batches_alone(tmp_path):
    runs = Livt(tmp_path)
    runs.train(tmp_path / "run", stage="finetune", stages__finetune__init="scratch", **{"stages__*__epochs": 1})
    waits = livt(tmp_path / "waits.json", "eval", str(tmp_path / "run"))
    loads = {"train/open_trained.py", "train/load_trained.py", "posthoc/evaluate_path.py"}
    assert set(waits) <= {"data/normalise.py", *EVALUATES, *loads}
