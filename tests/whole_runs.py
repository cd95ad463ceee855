"""Whole runs in processes of their own: a small model on the real shards that ship, in seconds."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from livt_scale.study.runs import spelt
from tests import warm

REPO = Path(__file__).resolve().parents[1]
TINY = {
    "model.width": 48,
    "model.depth": 2,
    "model.decoder.width": 32,
    "model.decoder.depth": 1,
    "model.decoder.heads": 2,
    "stages.*.epochs": 2,
    "stages.*.global_batch": 256,  # 9 steps an epoch
    "stages.*.micro_batch": 64,
    "stages.*.warmup_epochs": 1,
    "checkpoint.every_steps": 3,
    "checkpoint.mode": "async",
    "log.every_steps": 1,
    "log.num_reconstructions": 2,
    "log.tensorboard": False,
    "data.workers": 1,
}


class Livt:
    """Runs `livt` as a user would, on a small recipe in `folder`; `module` stands in for it where a test needs that."""

    def __init__(self, folder: Path, *, module: str = "livt_scale") -> None:
        self.folder, self.module = folder, module
        self.recipe = REPO / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"

    def train_words(self, run_dir: Path, **sets: Any) -> list[str]:
        sets = {**TINY, "run_dir": run_dir, **{name.replace("__", "."): value for name, value in sets.items()}}
        return ["train", str(self.recipe), *(f"--set={name}={spelt(v)}" for name, v in sets.items())]

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
        out, err = process.communicate(timeout=240)
        assert process.returncode == expect, f"exit {process.returncode}\n{out}\n{err}"
        return warm.CompletedProcess(words, process.returncode, out, err)

    def train(self, run_dir: Path, *, processes: int = 1, expect: int = 0, **sets: Any) -> str:
        """Train to the end (or to exit code `expect`) and return stderr."""
        return self.run(*self.train_words(run_dir, **sets), processes=processes, expect=expect).stderr


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


def assert_same_run(one: Path, other: Path, *, stages: tuple[str, ...] = ("pretrain", "finetune")) -> None:
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
