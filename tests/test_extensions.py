"""A loss from a file outside the package is used like one that ships; mistakes name file and line."""

from __future__ import annotations

import pytest
import torch

from livt_scale import extensions
from livt_scale.config.load import load_recipe
from livt_scale.losses import LOSSES, make_loss
from livt_scale.util.errors import RecipeError, UsageError

POLY = """\
from livt_scale.losses import LOSSES, LossOptions

@LOSSES.register("poly1")
class Poly1(LossOptions):
    epsilon: float

    def build(self, counts):
        def loss(logits, targets):
            p = (targets * logits.softmax(1)).sum(1)
            return (-p.log() + self.epsilon * (1 - p)).mean()
        return loss
"""
RECIPE = "name: r\ndata: {train: t}\nstages:\n  finetune:\n    init: scratch\n    loss: {name: poly1, epsilon: 2}\n"


@pytest.fixture
def extension(tmp_path, monkeypatch):
    def name(text, file="poly.py"):
        (tmp_path / file).write_text(text)
        monkeypatch.setenv(extensions.VARIABLE, str(tmp_path / file))
        return tmp_path / file

    yield name
    if "poly1" in LOSSES:
        LOSSES.remove("poly1")


def test_a_loss_from_a_file_is_read_from_a_recipe_and_can_be_trained(tmp_path, extension):
    extension(POLY)
    (tmp_path / "a.yaml").write_text(RECIPE)
    loss = load_recipe(tmp_path / "a.yaml").stages.finetune.loss
    assert loss.model_dump() == {"name": "poly1", "epsilon": 2.0}
    logits = torch.zeros(2, 3, requires_grad=True)
    before = loss.criterion([5, 3, 1])(logits, torch.eye(3)[:2])
    before.backward()
    assert loss.criterion([5, 3, 1])(logits - logits.grad, torch.eye(3)[:2]) < before
    assert make_loss("poly1", [5, 3, 1], epsilon=0.0)(logits, torch.eye(3)[:2]) < before

    (tmp_path / "a.yaml").write_text(RECIPE.replace(", epsilon: 2", ""))
    with pytest.raises(RecipeError, match=r"line 6: stages\.finetune\.loss\.epsilon is missing and has no default"):
        load_recipe(tmp_path / "a.yaml")
    with pytest.raises(UsageError, match="needs the option 'epsilon'"):
        make_loss("poly1", [5, 3, 1])


def test_a_name_that_is_taken_is_refused_with_both_places(extension):
    file = extension(POLY.replace("poly1", "focal"), "taken.py")
    with pytest.raises(UsageError) as caught:
        extensions.load_extensions()
    assert caught.value.message.startswith(f"{file}, line 3: the loss 'focal' is already registered, by ")
    assert "builtin.py, line " in caught.value.message


@pytest.mark.parametrize("text", ["x = 1\nx = 1 / 0\n", "x = 1\nx = (\n"])
def test_an_extension_that_fails_at_import_names_file_and_line(extension, text):
    file = extension(text, "broken.py")
    with pytest.raises(UsageError) as caught:
        extensions.load_extensions()
    assert f"{file}, line 2: " in caught.value.message
