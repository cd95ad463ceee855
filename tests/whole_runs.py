"""Runs in processes of their own, in seconds: a small model on a third of the real shards that ship."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from livt_scale.data.build.indexing import index_tars
from livt_scale.data.shard_set import ShardSet
from livt_scale.study.runs import spelt
from tests import warm

REPO = Path(__file__).resolve().parents[1]
_TEMPORARY = tempfile.TemporaryDirectory(prefix="livt-tests-")  # removed at exit
TINY = {
    "model.width": 48,
    "model.depth": 2,
    "model.decoder.width": 32,
    "model.decoder.depth": 1,
    "model.decoder.heads": 2,
    "stages.*.epochs": 2,
    "stages.*.global_batch": 80,  # 9 steps an epoch of `small_sets`
    "stages.*.micro_batch": 40,
    "stages.*.warmup_epochs": 1,
    "checkpoint.every_steps": 3,
    "checkpoint.mode": "async",
    "log.every_steps": 1,
    "log.num_reconstructions": 2,
    "log.tensorboard": False,
    "data.workers": 1,
}


@cache
def small_sets() -> Path:
    """The folder of `train-lt`, 743 images of ten classes from 303 to 1 of each, and `val`, 250 images. Read only."""
    folder = Path(_TEMPORARY.name)
    for name, num_shards in (("train-lt", 3), ("val", 1)):
        shipped = ShardSet.open(REPO / "shards" / "fashion-mnist-lt" / name)
        (folder / name).mkdir()
        for number in range(num_shards):
            shutil.copy(shipped.shard_path(number), folder / name)
        index_tars(folder / name, class_names=shipped.manifest.class_names, workers=1)
    return folder


def small_data() -> dict[str, str]:
    return {"data.train": str(small_sets() / "train-lt"), "data.val": str(small_sets() / "val")}


class Livt:
    """Runs `livt` as a user would, on a small recipe in `folder`; `module` stands in for it where a test needs that."""

    def __init__(self, folder: Path, *, module: str = "livt_scale") -> None:
        self.folder, self.module = folder, module
        self.recipe = REPO / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"

    def train_words(self, run_dir: Path, **sets: Any) -> list[str]:
        sets = {**TINY, **small_data(), "run_dir": run_dir, **{k.replace("__", "."): v for k, v in sets.items()}}
        return ["train", str(self.recipe), "--no-report", *(f"--set={name}={spelt(v)}" for name, v in sets.items())]

    def start(self, *words: str, processes: int = 1) -> warm.Popen:
        environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        return warm.Popen(
            ["-m", self.module, *words],
            ranks=processes,
            cwd=self.folder,
            env=environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
            stdout=warm.PIPE,
            stderr=warm.PIPE,
        )

    def run(self, *words: str, processes: int = 1, expect: int = 0) -> warm.CompletedProcess[str]:
        process = self.start(*words, processes=processes)
        out, err = process.communicate(timeout=600)
        assert process.returncode == expect, f"exit {process.returncode}\n{out}\n{err}"
        return warm.CompletedProcess(words, process.returncode, out, err)

    def train(
        self, run_dir: Path, *, processes: int = 1, expect: int = 0, stage: str | None = None, **sets: Any
    ) -> str:
        """Train both stages, or one, to the end (or to exit code `expect`) and return stderr."""
        words = [*self.train_words(run_dir, **sets), *(["--stage", stage] if stage else [])]
        return self.run(*words, processes=processes, expect=expect).stderr


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def metrics(run_dir: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]


def final_weights(run_dir: Path, stage: str = "finetune") -> dict[str, Any]:
    """All tensors of the stage's last checkpoint: weights and moments."""
    from livt_scale.checkpoint import load

    last = load.list_checkpoints(run_dir / stage / "checkpoints")[-1]
    assert last.final
    assert last.whole
    return load.read_tensors(last.path)


def assert_same_run(one: Path, other: Path, *, stages: Sequence[str] = ("pretrain", "finetune")) -> None:
    """Bit for bit: the weights of the stages, and each step's loss."""
    import torch

    for stage in stages:
        ours, theirs = final_weights(one, stage), final_weights(other, stage)
        assert ours.keys() == theirs.keys()
        different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not different, f"{stage}: {different[:5]}"
        timeless = ("step", "epoch", "loss", "lr", "grad_norm")
        assert [[m[k] for k in timeless] for m in metrics(one, stage)] == [
            [m[k] for k in timeless] for m in metrics(other, stage)
        ]
