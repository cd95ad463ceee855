from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from livt_scale.checkpoint.store import Position, Retention, Saver
from livt_scale.commands.ckpt import app
from livt_scale.errors import CheckpointError, UsageError


def livt_ckpt(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def run(tmp_path):
    """A run with three checkpoints of pretraining, the middle one damaged, and a final one of fine-tuning."""
    run = tmp_path / 'my "run"'
    (run / "samples").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: x\n")
    for stage, saved in (("pretrain", (10, 20, 30)), ("finetune", (5,))):
        with Saver(run / stage / "checkpoints", mode="sync", retention=Retention(keep_last=9)) as saver:
            for step in saved:
                saver.save(
                    {"model.w": torch.full((9,), float(step))},
                    position=Position(step // 10, step),
                    facts={"stage": stage},
                    score=0.5 if stage == "finetune" else None,
                    final=stage == "finetune",
                )
    (run / "pretrain" / "checkpoints" / "step-00000020" / "__0_0.distcp").write_bytes(b"")
    return run


def test_ls_tells_step_epoch_size_age_and_what_is_damaged(run):
    result = livt_ckpt("ls", run)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["pretrain", "10", "1"],
        ["pretrain", "20", "2"],
        ["pretrain", "30", "3"],
        ["finetune", "5", "0"],
    ]
    assert "damaged  __0_0.distcp has 0 bytes" in lines[2]
    assert lines[4].split()[5:] == ["now", "whole", "best,", "final,", "score", "0.5000"]


def test_ls_json_is_for_scripts(run):
    rows = json.loads(livt_ckpt("ls", run, "--json").stdout)["checkpoints"]
    assert [(r["stage"], r["step"], r["epoch"], r["whole"], r["best"], r["final"]) for r in rows] == [
        ("pretrain", 10, 1, True, False, False),
        ("pretrain", 20, 2, False, False, False),
        ("pretrain", 30, 3, True, False, False),
        ("finetune", 5, 0, True, True, True),
    ]
    assert "__0_0.distcp" in rows[1]["why"]
    assert all(r["bytes"] > 0 and r["age_s"] >= 0 and r["path"].startswith(str(run)) for r in rows)


@pytest.mark.parametrize(
    ("place", "steps"), [("pretrain", [10, 20, 30]), ("pretrain/checkpoints", [10, 20, 30]), ("finetune", [5])]
)
def test_ls_takes_a_stage_or_the_folder_itself(run, place, steps):
    rows = json.loads(livt_ckpt("ls", run / place, "--json").stdout)["checkpoints"]
    assert [row["step"] for row in rows] == steps


def test_quick_reads_sizes_alone(run):
    data = run / "pretrain" / "checkpoints" / "step-00000030" / "__0_0.distcp"
    raw = bytearray(data.read_bytes())
    raw[50] ^= 1
    data.write_bytes(raw)
    assert "changed" in livt_ckpt("ls", run).stdout
    assert "changed" not in livt_ckpt("ls", run, "--quick").stdout


def test_verify_is_zero_for_what_is_whole_and_one_for_damage(run):
    checkpoints = run / "pretrain" / "checkpoints"
    assert livt_ckpt("verify", checkpoints / "step-00000010").exit_code == 0
    assert livt_ckpt("verify", run / "finetune").exit_code == 0
    result = livt_ckpt("verify", checkpoints / "step-00000020")
    assert result.exit_code == 1
    assert "__0_0.distcp has 0 bytes" in result.stdout
    result = livt_ckpt("verify", run, "--json")
    assert result.exit_code == 1
    assert [row["whole"] for row in json.loads(result.stdout)["checkpoints"]] == [True, False, True, True]


def test_verify_of_a_copy_under_another_name(run, tmp_path):
    copy = (run / "finetune" / "checkpoints" / "step-00000005").rename(tmp_path / "a copy")
    assert livt_ckpt("verify", copy).exit_code == 0


def test_what_is_no_run_is_said(run, tmp_path):
    for place in (tmp_path / "absent", run / "samples"):
        for command in ("ls", "verify"):
            assert isinstance(livt_ckpt(command, place).exception, UsageError)


def test_a_run_without_checkpoints_lists_none_and_cannot_be_verified(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    assert "No checkpoints" in livt_ckpt("ls", tmp_path).stdout
    assert json.loads(livt_ckpt("ls", tmp_path, "--json").stdout) == {"checkpoints": []}
    assert isinstance(livt_ckpt("verify", tmp_path).exception, CheckpointError)


def test_neither_command_imports_torch(run):
    program = (
        "import sys; from livt_scale.commands.ckpt import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    for command in ("ls", "verify"):
        subprocess.run([sys.executable, "-c", program, command, str(run / "finetune")], check=True, timeout=60)
