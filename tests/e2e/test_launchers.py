"""One run, whoever starts its processes: torchrun, torchrun that restarts them, accelerate launch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.whole_runs import REPO, Livt, final_weights, free_port

PRETRAIN_ALONE = {"stages__finetune": None, "stages__pretrain__epochs": 4, "parallel__timeout_s": 30}


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    Livt(folder).train(folder / "run", processes=2, **PRETRAIN_ALONE)
    return folder / "run"


@contextmanager
def launched(livt: Livt, launcher: list[str], run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """The launcher with its processes, all gone in the end."""
    words = livt.train_words(run_dir, **PRETRAIN_ALONE)
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    process = subprocess.Popen(
        [*launcher, "-m", "livt_scale", *words],
        cwd=livt.folder,
        env={**environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = (final_weights(run, "pretrain") for run in (one, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []


@pytest.mark.slow
def test_accelerate_launch_trains_the_same_run(livt, tmp_path, by_torchrun):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launcher += [
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        f"--main_process_port={free_port()}",
    ]
    with launched(livt, launcher, tmp_path / "run") as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "= 2 ranks ×" in said
    assert_same_weights(tmp_path / "run", by_torchrun)


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_after_one_was_killed_and_the_run_goes_on(livt, tmp_path, by_torchrun):
    run = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    launcher += [f"--master-port={free_port()}", "--monitor-interval=0.1"]
    saved = run / "pretrain" / "checkpoints" / "step-00000006"
    beat = run / "pretrain" / "heartbeats" / "rank-1.json"
    with launched(livt, launcher, run) as process:
        ends = time.monotonic() + 90
        while not (saved.is_dir() and beat.is_file()):
            assert time.monotonic() < ends, "no checkpoint within 90 s"
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        os.kill(json.loads(beat.read_text())["pid"], signal.SIGKILL)
        _, said = process.communicate(timeout=150)
    assert process.returncode == 0, said
    assert "resumed from step-" in said
    assert_same_weights(run, by_torchrun)


CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
use_cpu: true
num_processes: 2
num_machines: 1
machine_rank: 0
mixed_precision: 'no'
main_training_function: main
"""


@pytest.mark.slow
@pytest.mark.parametrize("by", ["option", "config file"])
def test_one_process_that_was_meant_to_be_two_is_refused(livt, tmp_path, by):
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    if by == "option":
        launcher += ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    else:
        (tmp_path / "config.yaml").write_text(CONFIG)
        launcher += [f"--config_file={tmp_path / 'config.yaml'}"]
    with launched(livt, launcher, tmp_path / "run") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("livt: error: accelerate launch starts one process")
    assert "use_cpu: true" in last
    assert not (tmp_path / "run").exists()
