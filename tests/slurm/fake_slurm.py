"""Slurm's commands as small programs on the PATH: they write down how they were called and do what a test has set.

fake = FakeSlurm(tmp_path / "bin")
fake.refuse_after(2)                    # the third sbatch fails
fake.calls("sbatch")                    # [["--parsable", …], …], arguments as they came, newlines and all
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

RECORDS = """\
#!{python} -IS
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
with (folder / "calls.jsonl").open("a") as file:
    file.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
(folder / "environ-{name}.json").write_text(json.dumps(dict(os.environ)))
calls = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
mine = [call for call in calls if call[0] == {name!r}]
settings = json.loads((folder / "settings.json").read_text())
"""
BODIES = {
    "sbatch": """
if len(mine) > settings["accepted"]:
    sys.exit("sbatch: error: Batch job submission failed: Job violates accounting/QOS policy")
comment = next(w for w in sys.argv if w.startswith("--comment=")).removeprefix("--comment=")
settings["queue"].append([str(100 + len(mine)), "PENDING", comment])
(folder / "settings.json").write_text(json.dumps(settings))
print(100 + len(mine))
""",
    "squeue": """
if settings["squeue_fails"]:
    sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
for job, state, comment in settings["queue"]:
    print(f"{job}|{state}|{comment}")
""",
    "scancel": """
if settings["scancel_fails"]:
    sys.exit("scancel: error: Kill job error on job id 101: Connection refused")
settings["queue"] = [row for row in settings["queue"] if row[0] not in sys.argv[1:]]
(folder / "settings.json").write_text(json.dumps(settings))
""",
    "scontrol": """
if sys.argv[1:] == ["show", "config"]:
    print(settings["config"])
elif sys.argv[1:] == ["--oneliner", "show", "partition"]:
    print(settings["partitions"])
""",
    "sacctmgr": "print(settings['qos' if sys.argv[2] == 'qos' else 'accounts'])\n",
}
PARTITIONS = (
    "PartitionName=normal AllowGroups=ALL Default=YES MaxNodes=UNLIMITED MaxTime=1-00:00:00 PreemptMode=OFF State=UP "
    "TotalCPUs=96 TotalNodes=6\n"
    "PartitionName=spare Default=NO MaxNodes=UNLIMITED MaxTime=12:00:00 PreemptMode=REQUEUE State=UP\n"
    "PartitionName=scrap Default=NO MaxNodes=4 MaxTime=UNLIMITED PreemptMode=CANCEL State=DOWN\n"
)
CONFIG = "Configuration data as of 2026-01-01T00:00:00\nJobRequeue              = 1\nKillWait                = 30 sec"


class FakeSlurm:
    """The commands in `folder`; put it on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.settings = {
            "accepted": 99, "queue": [], "squeue_fails": False, "scancel_fails": False,
            "config": CONFIG, "partitions": PARTITIONS, "accounts": "lab\nother\n", "qos": "",
        }  # fmt: skip
        self._save()
        (folder / "calls.jsonl").write_text("")
        for name, body in BODIES.items():
            self.program(name, RECORDS.format(python=sys.executable, folder=str(folder), name=name) + body)

    def program(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)

    def set(self, **settings: object) -> None:
        self.settings = json.loads((self.folder / "settings.json").read_text()) | settings
        self._save()

    @property
    def queue(self) -> list[list[str]]:
        return json.loads((self.folder / "settings.json").read_text())["queue"]

    def calls(self, name: str) -> list[list[str]]:
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return [call[1:] for call in map(json.loads, lines) if call[0] == name]

    def environ(self, name: str) -> dict[str, str]:
        """Of the last call of this command."""
        return json.loads((self.folder / f"environ-{name}.json").read_text())

    @property
    def path(self) -> str:
        return f"{self.folder}:{os.environ['PATH']}"

    def _save(self) -> None:
        (self.folder / "settings.json").write_text(json.dumps(self.settings))
