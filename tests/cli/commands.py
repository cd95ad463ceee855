"""Commands in this process, and what their tests put in place of a pause or of squeue."""

from __future__ import annotations

import time
import types

from typer.testing import CliRunner

from livt_scale.cli import main
from tests.slurm.replayed_slurm import ReplayedSlurm


def livt(*words: object):
    return CliRunner().invoke(main.app, [str(w) for w in words])


def pauses(module, monkeypatch, instead) -> None:
    """The module's own pauses become `instead`; subprocess, which pauses too, keeps its own."""
    named = {name: getattr(time, name) for name in ("time", "monotonic", "strftime", "localtime")}
    monkeypatch.setattr(module, "time", types.SimpleNamespace(**named, sleep=instead))


def fake_user(fake: ReplayedSlurm) -> None:
    """`alive` reads other columns of squeue than status does: id, state, comment."""
    script = fake.folder / "squeue"
    text = script.read_text()
    script.write_text(
        text.replace(
            'sys.stdout.write(told["out"])',
            'rows = [line.split("|") for line in told["out"].splitlines()]\n'
            'short = any("%i|%T|%k" in word for word in sys.argv)\n'
            'sys.stdout.write("".join("|".join([r[0], r[1], r[7]] if short else r) + "\\n" for r in rows))',
        )
    )
