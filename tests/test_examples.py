"""The programs in examples/ run as they are, and so does the first program of docs/api.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import livt_scale as livt
from livt_scale.config.load import load_recipe
from livt_scale.train.run_files import read_eval
from tests import warm
from tests.tiny_run import CLASS_NAMES, tiny_recipe, tiny_run, tiny_shards
from tests.whole_runs import final_weights, small_data, small_sets

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_LINES = 60


def said_by(program, *arguments, **options):
    return warm.run([ROOT / "examples" / program, *arguments], cwd=ROOT, check=True, **options).stdout


def test_each_is_short_and_is_listed_with_the_api():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert {path.name for path in EXAMPLES} == set(re.findall(r"^\| `(\w+\.py)` \|", page, re.MULTILINE))
    for path in EXAMPLES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES, path.name


def program_of_the_page():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    return re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]


def shorter_program(**changes):
    program = program_of_the_page()
    for old, new in changes.values():
        assert old in program
        program = program.replace(old, new)
    return program


def test_the_program_of_the_page_learns_bit_for_bit_what_livt_train_learns(tmp_path, capsys):
    epoch = {"range": ("range(30)", "range(1)"), "epochs": ('"epochs": 30', '"epochs": 1')}
    warmup = {"warmup": ('"warmup_epochs": 3', '"warmup_epochs": 0.5')}
    names = {}
    exec(shorter_program(data=("shards/fashion-mnist-lt", str(small_sets())), **epoch, **warmup), names)
    printed = capsys.readouterr().out

    values = {"epochs": 1, "warmup_epochs": 0.5, "init": "scratch"}
    run = livt.train(
        ROOT / "recipes" / "fashion_mnist_lt" / "quickstart.yaml",
        overrides={**small_data(), "run_dir": str(tmp_path / "run"), "stages.pretrain": None, "log.tensorboard": False}
        | {f"stages.finetune.{name}": value for name, value in values.items()},
    )
    assert printed == f"{read_eval(run / 'finetune' / 'eval.json')['top1']}\n"
    saved = final_weights(run)
    for name, tensor in names["model"].state_dict().items():
        assert torch.equal(tensor, saved[f"model.{name}"]), name


@pytest.mark.slow  # half a minute of CPU
def test_a_loop_without_a_schedule_learns():
    """Without a schedule, and with random numbers for stochastic depth from torch's global generator."""
    names = {}
    exec(
        shorter_program(
            range=("range(30)", "range(5)"),
            rate=("        livt.optim.set_lr(optimizer, livt.optim.lr_at(step, **schedule))\n", ""),
            depth=("    num_branches=model.num_branches,\n", ""),
            unpacked=("(images, targets, drop)", "(images, targets)"),
            call=("model(images, drop)", "model(images)"),
        ),
        names,
    )
    top1 = names["livt"].evaluate(names["model"], names["val"], names["shards"])["top1"]
    assert top1["all"] > 0.3  # of ten classes


def test_a_loop_of_ones_own():
    lines = said_by("own_loop.py", "--epochs", "2", "--steps", "2").splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["epoch 0", "epoch 1"]
    assert re.fullmatch(r"top-1 all [\d.]+ %, many [\d.]+ %, medium [\d.]+ %, few [\d.]+ %", lines[2])


def test_the_loss_alone_in_a_script_of_timm():
    text = said_by("timm_loss.py", "--steps", "5")
    assert re.search(r"loss [\d.]+ after 5 steps\naccuracy by class: ", text)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loader_with_accelerate(ranks):
    text = said_by("accelerate_loader.py", "--cpu", "--steps", "2", ranks=ranks)
    assert f"{ranks} processes, {64 // ranks} images each, loss " in text
    assert re.search(r"top-1 [\d.]+ %", text)


def test_a_loss_of_ones_own_is_known_to_the_api_and_to_recipes(monkeypatch):
    lines = said_by("custom_loss.py").splitlines()
    assert lines[0] == "power 0.0: largest class 2.303, smallest 2.303"
    assert lines[3].startswith("power is 2")
    monkeypatch.setenv("LIVT_EXTENSIONS", str(ROOT / "examples" / "custom_loss.py"))
    sets = ["stages.finetune.loss.name=sqrt_weighted"]
    assert load_recipe(ROOT / "recipes/fashion_mnist_lt/quickstart.yaml", sets=sets).stages.finetune.loss.power == 0.5


def test_reading_a_checkpoint(tmp_path):
    tiny_run(tmp_path / "run", tiny_recipe(train="gone"), final=False)
    tiny_shards(tmp_path / "set", {"a": 1})
    photo = tmp_path / "set" / "raw" / "a" / "0.png"
    text = said_by("read_checkpoint.py", tmp_path / "run", photo, "--checkpoint", "newest")
    assert f"4 classes: {', '.join(CLASS_NAMES)}" in text
    assert re.search(rf"{photo}: .* [\d.]+ %", text)
    assert text.endswith("features [1, 96]\n")
