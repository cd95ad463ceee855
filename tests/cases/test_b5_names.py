"""Case B5: a wrong name or flag gets the remedy that leads to what was meant."""

from __future__ import annotations

import sys

import pytest

from livt_scale.cli import main as cli
from livt_scale.config.load import load_recipe
from livt_scale.config.model import MODEL_SIZES, RESNETS
from livt_scale.plan.assumptions import accelerator
from livt_scale.plan.devices import DEVICES
from livt_scale.util.errors import RecipeError, UsageError


def livt(monkeypatch, capsys, *words: str) -> tuple[int, str]:
    """(exit code, stderr) of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["livt", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capsys.readouterr().err


def test_b5_a_wrong_size_gets_the_one_that_begins_alike_and_all_that_there_are():
    with pytest.raises(RecipeError) as caught:
        load_recipe("livt:imagenet_lt/vit_b16", sets=["model.size=vit_base"])
    assert "model.size is 'vit_base': did you mean 'vit_b'?" in caught.value.message
    assert all(size in caught.value.message.partition("Valid names: ")[2] for size in (*MODEL_SIZES, *RESNETS))


def test_b5_a_wrong_device_gets_the_one_that_begins_alike():
    with pytest.raises(UsageError) as caught:
        accelerator("v100-sxm")
    assert caught.value.remedy.startswith("did you mean 'v100'?")
    assert all(name in caught.value.remedy.partition("Valid names: ")[2] for name in DEVICES)


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        (["--lr", "1e-3"], "--set stages.pretrain.base_lr=1e-3 or --set stages.finetune.base_lr=1e-3"),
        (["--epochs=30"], "--set stages.pretrain.epochs=30 or --set stages.finetune.epochs=30"),
        (["--batch-size", "64"], "--set stages.pretrain.global_batch=64 or --set stages.finetune.global_batch=64"),
        (["--mixup"], "--set stages.finetune.mixup=VALUE"),
        (["--data.val", "a b"], "--set data.val='a b'"),
        (["--alow", "seed"], "Did you mean '--allow'?"),
        (["--gpus", "8"], "Valid names: --allow, --allow-download, --help, --report, --set, --stage"),
    ],
)
def test_b5_a_flag_that_is_a_field_of_the_recipe_gets_the_set_that_does_it(flag, remedy, monkeypatch, capsys):
    code, said = livt(monkeypatch, capsys, "train", "livt:fashion_mnist_lt/quickstart", *flag)
    assert code == 2
    assert f"livt: error: livt train has no option {flag[0].partition('=')[0]}. " in said
    assert remedy in said


def test_b5_a_field_that_other_scripts_call_otherwise_is_found():
    with pytest.raises(RecipeError, match=r"no field stages\.finetune\.lr: did you mean 'base_lr'\?"):
        load_recipe("livt:imagenet_lt/vit_b16", sets=["stages.finetune.lr=1"])
    with pytest.raises(RecipeError, match=r"no field lr: did you mean 'stages\.pretrain\.base_lr' or 'stages\.fine"):
        load_recipe("livt:imagenet_lt/vit_b16", sets=["lr=1"])
