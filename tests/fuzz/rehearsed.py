"""Imported by the server of the fuzzers' processes: what the commands without torch import, and one of them run once.

What a command computes once per process (which packages extend livt, the types of a recipe, the formats of Pillow) is
then present in every fork, and an example takes a third of the time.
"""

from __future__ import annotations

import importlib
import io
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import PIL.Image

from livt_scale.cli.main import main

IMPORTS = (
    "livt_scale.checkpoint.catalog",
    "livt_scale.data.build.indexing",
    "livt_scale.data.build.verify",
    "livt_scale.data.inspect",
    "livt_scale.slurm.next_step",
    "livt_scale.slurm.status",
    "livt_scale.train.preflight",
    "fsspec.implementations.http",
    "tests.fuzz.watched",
    "_strptime",
    "mmap",
    "numpy.ma",
)
RECIPE = """\
name: rehearsed
data: {train: nothing, mean: [0.5], std: [0.5]}
model: {size: vit_micro, image_px: 28, channels: 1}
stages: {finetune: {init: scratch, epochs: 1, warmup_epochs: 0, global_batch: 2, micro_batch: 2}}
"""


def rehearse() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    PIL.Image.preinit()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rehearsed.yaml"
        path.write_text(RECIPE)
        words, sys.argv = sys.argv, ["livt", "recipe", "check", str(path)]
        with redirect_stdout(io.StringIO()) as said, redirect_stderr(said), suppress(SystemExit):
            main()
        sys.argv = words
    tempfile.tempdir = None  # each fork has its variables
    assert "ok " in said.getvalue(), said.getvalue()


rehearse()
