"""A user who is not root, as nearly all users of a cluster are, if one can run here what is installed.

user = ordinary_user()           None: only root can read Python or the packages
user.command("id", "--name")     that command, as the user; from root
"""

from __future__ import annotations

import pwd
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.whole_runs import REPO

NAME = "daemon"  # every Debian has it; a home and a shell are not needed
PATHS = f"{REPO}:{sysconfig.get_paths()['purelib']}"


@dataclass(frozen=True)
class User:
    name: str
    python: str

    @property
    def uid(self) -> int:
        return pwd.getpwnam(self.name).pw_uid

    def command(self, *words: str | Path) -> tuple[str, ...]:
        return ("runuser", "-u", self.name, "--", *map(str, words))

    def environ(self, home: Path) -> dict[str, str]:
        return {"HOME": str(home), "PYTHONPATH": PATHS}


@cache
def ordinary_user() -> User | None:
    for python in (sys.executable, "/usr/bin/python{}.{}".format(*sys.version_info)):
        user = User(NAME, python)
        tried = user.command("env", f"PYTHONPATH={PATHS}", python, "-P", "-c", "import pydantic, livt_scale")
        if subprocess.run(tried, cwd="/", capture_output=True, timeout=60).returncode == 0:
            return user
    return None
