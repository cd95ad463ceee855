"""What many runs cost where they are submitted and watched: an array of 100, a chain of 65 jobs, 200 runs by status.

    python benchmarks/many_runs.py --json many_runs.json     # a minute on two cores
    python benchmarks/many_runs.py --quick                   # 3 runs, 5 jobs, 3 runs: figures without meaning

Each figure is of one `livt` process, from its start to its end, with imports and with the programs that it starts:
`wall_s`, and `cpu_s`, which other work on the machine changes less. `bytes`: what the submission has written, with the
copy of the code. `asked`: how often it has asked Slurm, whose commands are shell scripts here that answer immediately.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from livt_scale.config.load import load_recipe, to_yaml
from livt_scale.util.resources import shipped

RECIPE = "recipes/fashion_mnist_lt/quickstart.yaml"
KNOWN = ("--set=slurm.step_s=1", "--set=slurm.save_s=1")
RUNS, JOBS, WATCHED, LINES = 100, 65, 200, 5000
ANSWERS = {
    "sbatch": 'grep -c ^sbatch "$CALLS"',
    "squeue": "true",
    "sacct": "true",
    "sacctmgr": "true",
    "scontrol": 'echo "PartitionName=normal Default=YES MaxTime=1-00:00:00 PreemptMode=OFF State=UP TotalNodes=6"',
}
Figures = dict[str, float]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--rounds", type=int, default=3, help="a figure is their median")
    parser.add_argument("--quick", action="store_true", help="one round, few runs: figures without meaning")
    options = parser.parse_args(arguments)
    rounds, runs, jobs, watched = (1, 3, 5, 3) if options.quick else (options.rounds, RUNS, JOBS, WATCHED)
    result = {
        f"array of {runs}": median_of([array(runs) for _ in range(rounds)]),
        f"chain of {jobs} jobs": median_of([chain(jobs) for _ in range(rounds)]),
        f"status of {watched} runs": median_of([status(watched) for _ in range(rounds)]),
    }
    for name, figures in result.items():
        print(f"{name:<22} " + ", ".join(f"{what} {value:.10g}" for what, value in figures.items()))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def array(runs: int) -> Figures:
    """Submit `runs` runs by one command."""
    with tempfile.TemporaryDirectory(prefix="livt-many-") as name:
        folder = Path(name)
        recipes = [folder / f"{k}.yaml" for k in range(runs)]
        for k, path in enumerate(recipes):
            own = {
                "extends": str(shipped(RECIPE)),
                "name": f"r{k}",
                "seed": k,
                "run_dir": str(folder / "runs" / str(k)),
            }
            path.write_text(json.dumps(own))  # JSON is YAML
        figures = livt(folder, "submit", *map(str, recipes), *KNOWN, "--json")
        return figures | {"bytes": sum(path.stat().st_size for path in (folder / "runs").rglob("*") if path.is_file())}


def chain(jobs: int) -> Figures:
    """Submit one run in `jobs` jobs: segments of both stages, and two of the evaluation."""
    first = (jobs - 2) // 2
    segments = {"mode": "segments", "pretrain.segments": first, "finetune.segments": jobs - 2 - first}
    sets = [f"--set=slurm.{name}={value}" for name, value in segments.items()]
    with tempfile.TemporaryDirectory(prefix="livt-many-") as name:
        run_dir = Path(name) / "run"
        figures = livt(Path(name), "submit", str(shipped(RECIPE)), f"--set=run_dir={run_dir}", *KNOWN, *sets)
        submitted = json.loads((run_dir / "slurm" / "chain.json").read_text())["jobs"]
        assert len(submitted) == jobs, len(submitted)
        return figures


def status(runs: int) -> Figures:
    """Show `runs` runs that train, each with a chain and 5000 lines of metrics (800 kB)."""
    with tempfile.TemporaryDirectory(prefix="livt-many-") as name:
        made_runs(Path(name) / "runs", runs)
        return livt(Path(name), "status", str(Path(name) / "runs"))


def made_runs(folder: Path, count: int) -> list[Path]:
    recipe = to_yaml(load_recipe(shipped(RECIPE)))
    runs = [folder / f"{k:03}" for k in range(count)]
    for run in runs:
        write_run(run, recipe)
    return runs


def write_run(folder: Path, recipe: str) -> None:
    """What a run in step 120 of its pretraining has written."""
    stage, at = folder / "pretrain", time.strftime("%Y-%m-%dT%H:%M:%S%z")
    (stage / "heartbeats").mkdir(parents=True)
    (folder / "slurm").mkdir()
    (folder / "recipe.yaml").write_text(recipe)
    process = {"host": socket.gethostname(), "pid": os.getpid(), "state": "running"}
    facts = {"stage": "pretrain", "step": 120, "total_steps": 10_000, "at": at, "since": at}
    (stage / "status.json").write_text(json.dumps(process | facts))
    beat = {"rank": 0, "phase": "step", "step": 120, "since": time.time() - 2, "at": time.time()}
    (stage / "heartbeats" / "rank-0.json").write_text(json.dumps(process | beat))
    line = {"images_per_s": 5120.0, "step_s": 0.05, "data_wait_s": 0.001, "mfu": 0.412, "world_size": 8, "loss": 2.0}
    lines = (json.dumps({**line, "step": 20 * k, "epoch": k / 5}) + "\n" for k in range(1, LINES + 1))
    (stage / "metrics.jsonl").write_text("".join(lines))
    jobs = [{"id": str(14 + k), "stage": name, "submitted_at": at} for k, name in enumerate(("pretrain", "finetune"))]
    (folder / "slurm" / "chain.json").write_text(json.dumps({"version": 1, "chain": "livt 7cc2", "jobs": jobs}))


def livt(folder: Path, *words: str) -> Figures:
    """Run the command with the present package and a Slurm of shell scripts."""
    calls = folder / "calls"
    calls.touch()
    (folder / "bin").mkdir()
    for name, body in ANSWERS.items():
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >>"$CALLS"\n{body}\n')
        program.chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), *os.get_exec_path()])
    environ = os.environ | {"PATH": path, "CALLS": str(calls)}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "livt_scale", *words], cwd=folder, env=environ, stdout=subprocess.DEVNULL
    )
    _, code, used = os.wait4(process.pid, 0)
    figures = {"wall_s": time.perf_counter() - began, "cpu_s": used.ru_utime + used.ru_stime}
    process.returncode = os.waitstatus_to_exitcode(code)
    assert process.returncode == 0, f"livt {words[0]}: exit {process.returncode}"
    asked = [line for line in calls.read_text().splitlines() if not line.startswith("sbatch")]
    return figures | {"asked": len(asked)}


def median_of(rounds: list[Figures]) -> Figures:
    return {what: statistics.median(each[what] for each in rounds) for what in rounds[0]}


if __name__ == "__main__":
    sys.exit(main())
