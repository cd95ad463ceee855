"""Slurm's commands, replayed from a PATH: what Slurm 22.05 prints, recorded from a cluster, and what it was asked.

fake = ReplayedSlurm(tmp_path, monkeypatch)
fake.squeue("14|PENDING|Dependency|0:00|1:00|N/A||livt 7cc2")
fake.says("sacct", error="Slurm accounting storage is disabled", code=1)
fake.calls      [["squeue", "--noheader", …], …]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

COMMANDS = ("squeue", "sacct", "scancel", "scontrol")
SCRIPT = """#!{python} -IS
import json, os, sys, time
here, name = {folder!r}, os.path.basename(sys.argv[0])
with open(os.path.join(here, "calls"), "a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
told = json.load(open(os.path.join(here, name + ".json")))
time.sleep(told["sleeps"])
for when, then in told["on"].items():  # what one command does is seen by the others
    if when in sys.argv:
        for other, said in then.items():
            path = os.path.join(here, other + ".json")
            json.dump({{**json.load(open(path)), "out": said}}, open(path, "w"))
sys.stdout.write(told["out"])
sys.stderr.write(told["error"])
sys.exit(told["code"])
"""


class ReplayedSlurm:
    """Nothing is in the queue, and accounting knows of nothing, until it is told so."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder = folder / "fake slurm"
        self.folder.mkdir()
        for name in COMMANDS:
            (self.folder / name).write_text(SCRIPT.format(python=sys.executable, folder=str(self.folder)))
            (self.folder / name).chmod(0o755)
            self.says(name)
        monkeypatch.setenv("PATH", f"{self.folder}:{os.environ['PATH']}")

    def says(self, name: str, out: str = "", *, error: str = "", code: int = 0, sleeps: float = 0, on=None) -> None:
        told = {"out": out, "error": error, "code": code, "sleeps": sleeps, "on": on or {}}
        (self.folder / f"{name}.json").write_text(json.dumps(told))

    def squeue(self, *rows: str) -> None:
        self.says("squeue", "".join(f"{row}\n" for row in rows))

    def sacct(self, *rows: str) -> None:
        self.says("sacct", "".join(f"{row}\n" for row in rows))

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
