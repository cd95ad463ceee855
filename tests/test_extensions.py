"""Each example of docs/extending.md in a file outside the package is used like what ships; mistakes name the line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from livt_scale import extensions, optim
from livt_scale.config.load import from_saved, load_recipe, load_saved, to_yaml
from livt_scale.config.model import MODEL_SIZES
from livt_scale.config.optimizers import OPTIMIZERS
from livt_scale.config.sampling import SAMPLERS
from livt_scale.data.build.builder import build
from livt_scale.data.build.formats import SOURCE_FORMATS
from livt_scale.data.build.spec import load_spec
from livt_scale.data.build.verify import verify
from livt_scale.data.order.for_stage import stage_order, usable_labels
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.world import World
from livt_scale.distributed.wrap import make_strategy
from livt_scale.export.write_export import export_run
from livt_scale.losses import LOSSES, make_loss
from livt_scale.models.mae import build_mae
from livt_scale.plan.exact import measure
from livt_scale.plan.memory import Spread
from livt_scale.plan.parameters import stage_weights, weights_of
from livt_scale.plan.stage_plan import strategies_for
from livt_scale.train.export_info import read_info
from livt_scale.util.errors import CheckpointMismatch, ExportError, RecipeError, UsageError
from livt_scale.weights.layouts import infer_model
from tests.small_sets import encoded
from tests.tiny_run import tiny_recipe, tiny_run

ROOT = Path(__file__).parents[1]
RECIPE = "name: r\ndata: {train: t}\nstages:\n  finetune:\n    init: scratch\n    loss: {name: poly1, epsilon: 2}\n"
QUICKSTART = ROOT / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"

# heading of docs/extending.md -> the registry, the example's name, and the file that registers those that ship
KINDS: dict[str, tuple[Any, str, str]] = {
    "A loss": (LOSSES, "poly1", "builtin.py"),
    "A sampler": (SAMPLERS, "cubic_root", "sampling.py"),
    "An optimizer": (OPTIMIZERS, "heavy_ball", "optimizers.py"),
    "A model size": (MODEL_SIZES, "vit_tiny_mine", "model.py"),
    "A source format": (SOURCE_FORMATS, "csv", "formats.py"),
}


def example(kind):
    text = (ROOT / "docs" / "extending.md").read_text()
    return re.search(rf"^## {kind}\n\n```python\n(.*?)```", text, re.MULTILINE | re.DOTALL)[1]


@pytest.fixture
def extension(tmp_path, monkeypatch):
    def name(text, file="mine.py"):
        (tmp_path / file).write_text(text)
        monkeypatch.setenv(extensions.VARIABLE, str(tmp_path / file))
        return tmp_path / file

    yield name
    for registry, example_name, _ in KINDS.values():
        if example_name in registry:
            registry.remove(example_name)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_is_at_most_15_lines_of_code(kind):
    assert len([line for line in example(kind).splitlines() if line.strip()]) <= 15


def test_a_loss_is_read_from_a_recipe_and_can_be_trained(tmp_path, extension):
    extension(example("A loss"))
    (tmp_path / "a.yaml").write_text(RECIPE)
    loss = load_recipe(tmp_path / "a.yaml").stages.finetune.loss
    assert loss.model_dump() == {"name": "poly1", "epsilon": 2.0}
    logits = torch.zeros(2, 3, requires_grad=True)
    before = loss.criterion([5, 3, 1])(logits, torch.eye(3)[:2])
    before.backward()
    assert loss.criterion([5, 3, 1])(logits - logits.grad, torch.eye(3)[:2]) < before
    assert make_loss("poly1", [5, 3, 1], epsilon=0.0)(logits, torch.eye(3)[:2]) < before


def test_what_was_saved_with_a_loss_that_is_not_loaded_says_where_to_name_it(tmp_path, extension, monkeypatch):
    extension(example("A loss"))
    (tmp_path / "a.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "a.yaml")
    (tmp_path / "saved.yaml").write_text(to_yaml(recipe))
    values = recipe.model_dump(mode="json")
    monkeypatch.delenv(extensions.VARIABLE)
    LOSSES.remove("poly1")
    with pytest.raises(CheckpointMismatch, match=r"loss\.name is 'poly1'.* [Ss]et LIVT_EXTENSIONS to the file"):
        from_saved(values, where=tmp_path)
    with pytest.raises(RecipeError, match=r"(?s)loss\.name is 'poly1'.* set LIVT_EXTENSIONS to the file"):
        load_saved(tmp_path / "saved.yaml")


def test_an_export_with_a_loss_that_is_not_loaded_says_where_to_name_it(tmp_path):
    tiny_run(tmp_path / "run", tiny_recipe(train="gone"))
    export_run(tmp_path / "run", tmp_path / "export")
    config = tmp_path / "export" / "config.json"
    values = json.loads(config.read_text())
    values["livt"]["loss"] = {"name": "poly1", "epsilon": 1.0}
    config.write_text(json.dumps(values))
    with pytest.raises(ExportError, match=r"loss\.name is 'poly1'.* [Ss]et LIVT_EXTENSIONS to the file"):
        read_info(tmp_path / "export")


def test_a_required_option_that_is_missing_is_named_with_its_line(tmp_path, extension):
    extension(example("A loss").replace("Field(2.0, ", "Field("))
    (tmp_path / "a.yaml").write_text(RECIPE.replace(", epsilon: 2", ""))
    with pytest.raises(RecipeError, match=r"line 6: stages\.finetune\.loss\.epsilon is missing and has no default"):
        load_recipe(tmp_path / "a.yaml")
    with pytest.raises(UsageError, match="needs the option 'epsilon'"):
        make_loss("poly1", [5, 3, 1])


def test_a_sampler_orders_a_shipped_set(extension):
    extension(example("A sampler"))
    recipe = load_recipe(QUICKSTART, sets=["stages.finetune.sampling.policy=cubic_root"])
    shards = ShardSet.open(recipe.data.train, data=recipe.data)
    order, labels = stage_order(shards, recipe, "finetune"), usable_labels(shards)
    drawn = np.bincount(labels[np.concatenate([order.positions(0, step) for step in range(order.steps_per_epoch)])])
    weights = np.bincount(labels) ** (1 / 3)
    np.testing.assert_allclose(drawn, weights / weights.sum() * drawn.sum(), atol=2)

    ends = "stages.finetune.sampling={policy: progressive, from: instance, to: cubic_root}"
    assert load_recipe(QUICKSTART, sets=[ends]).stages.finetune.sampling.shares(np.array([8, 1]), 1.0)[0] == 2 / 3


def test_a_model_size_is_built_planned_and_recognised(extension):
    extension(example("A model size"))
    sets = ["model.size=vit_tiny_mine", "model.patch_px=null"]
    model = load_recipe(QUICKSTART, sets=sets).model
    assert (model.size, model.dims, model.num_patches) == ("vit_tiny_mine", (64, 4, 2, 4), 49)
    mae = build_mae(model, norm_pix=True, mask_ratio=0.75)
    assert torch.isfinite(mae(torch.randn(2, 1, 28, 28), torch.rand(2, 49)))
    planned = {weight.name: weight.shape for weight in weights_of(model, "pretrain", num_classes=10)}
    assert planned == {name: tuple(tensor.shape) for name, tensor in mae.state_dict().items()}
    assert infer_model(mae.state_dict(), decoder_heads=model.decoder.heads) == model

    with pytest.raises(RecipeError, match=r"model\.size is 'vit_tiny_mien': did you mean 'vit_tiny_mine'"):
        load_recipe(QUICKSTART, sets=["model.size=vit_tiny_mien"])


def test_the_process_that_measures_a_plan_knows_a_model_size(extension):
    extension(example("A model size"))
    recipe = load_recipe(QUICKSTART, sets=["model.size=vit_tiny_mine", "model.patch_px=null"])
    assert measure(recipe, "pretrain", Spread("ddp", 1, "fp32", 8), num_classes=10).peak > 0


HEAVY_BALL = "stages.finetune.optimizer={name: heavy_ball, momentum: 0.5}"


def heavy_ball_strategy(recipe, seed=0):
    torch.manual_seed(seed)
    maker = optim.optimizer_maker(recipe.stages.finetune)

    def groups(net):
        return optim.param_groups(net, lr=1e-3, weight_decay=0.1, layer_decay=None)

    return make_strategy(
        recipe.parallel, nn.Linear(3, 2), groups, betas=(0.9, 0.99), world=World(), make_optimizer=maker
    )


def step(strategy, seed, *, lr=0.1):
    torch.manual_seed(seed)
    strategy.backward(strategy.call(torch.randn(4, 3), last=True).square().sum(), last=True)
    assert strategy.update(lr, max_norm=None).applied


def test_an_optimizer_steps_and_its_state_is_saved_and_resumed(tmp_path, extension):
    extension(example("An optimizer"))
    recipe = load_recipe(QUICKSTART, sets=[HEAVY_BALL])
    (tmp_path / "saved.yaml").write_text(to_yaml(recipe))
    assert load_saved(tmp_path / "saved.yaml").stages.finetune.optimizer == recipe.stages.finetune.optimizer

    strategy = heavy_ball_strategy(recipe)
    plain = nn.Linear(3, 2)
    plain.load_state_dict(strategy.model.state_dict())
    reference = torch.optim.SGD([{"params": [plain.bias]}, {"params": [plain.weight], "weight_decay": 0.1}], 0.1, 0.5)
    for seed in (1, 2):
        step(strategy, seed)
        torch.manual_seed(seed)
        reference.zero_grad()
        plain(torch.randn(4, 3)).square().sum().backward()
        reference.step()
    torch.testing.assert_close(strategy.model.weight, plain.weight)

    saved = {name: tensor.clone() for name, tensor in strategy.state().items()}
    assert saved["optim.weight.momentum_buffer"].abs().max() > 0
    resumed = heavy_ball_strategy(recipe, seed=9)
    state = resumed.state()
    assert state.keys() == saved.keys()
    for name, tensor in state.items():
        tensor.copy_(saved[name])
    resumed.restored(state)
    step(strategy, 3)
    step(resumed, 3)
    assert all(torch.equal(tensor, resumed.state()[name]) for name, tensor in strategy.state().items())


def test_state_that_a_resumed_run_would_not_have_is_an_error(extension):
    extension(example("An optimizer").replace('["momentum_buffer"] =', "; _ ="))
    strategy = heavy_ball_strategy(load_recipe(QUICKSTART, sets=[HEAVY_BALL]))
    with pytest.raises(UsageError, match="SGD keeps momentum_buffer of a parameter"):
        step(strategy, 1)


def test_an_optimizer_is_planned_with_its_moments_and_refused_by_the_zeros(extension):
    extension(example("An optimizer"))
    recipe = load_recipe(QUICKSTART, sets=[HEAVY_BALL])
    assert {weight.moments for weight in stage_weights(recipe, "finetune", num_classes=10)} == {1}
    assert {weight.moments for weight in stage_weights(recipe, "pretrain", num_classes=10)} == {2}
    assert strategies_for(recipe.stages.finetune) == ("ddp", "fsdp")
    with pytest.raises(RecipeError, match=r"optimizer 'heavy_ball' is given.*'zero2': set strategy to ddp or fsdp"):
        load_recipe(QUICKSTART, sets=[HEAVY_BALL, "parallel.strategy=zero2"])
    with pytest.raises(RecipeError, match="momentum has no effect on optimizer 'heavy_ball'"):
        load_recipe(QUICKSTART, sets=[HEAVY_BALL, "stages.finetune.momentum=0.9"])


@pytest.mark.parametrize("short", ["adamw", "lars"])
def test_an_optimizer_without_options_is_saved_as_its_name(short):
    recipe = load_recipe(QUICKSTART, sets=[f"stages.finetune.optimizer={{name: {short}}}"])
    assert recipe == load_recipe(QUICKSTART, sets=[f"stages.finetune.optimizer={short}"])
    assert recipe.model_dump(mode="json")["stages"]["finetune"]["optimizer"] == short
    with pytest.raises(RecipeError, match="did you mean"):
        load_recipe(QUICKSTART, sets=[f"stages.finetune.optimizer={short}z"])


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_source_is_built_into_shards(tmp_path, extension, workers):
    text = example("A source format").replace("checked(FileSource(", "checked(Mine(")
    extension(text + "\nclass Mine(FileSource):\n    pass\n")  # of a class that other processes must import too
    (tmp_path / "raw").mkdir()
    for number in range(6):
        (tmp_path / "raw" / f"{number}.png").write_bytes(encoded(number))
    rows = [f"{number}.png,{'ab'[number % 3 == 0]}" for number in range(6)]
    (tmp_path / "raw" / "labels.csv").write_text("\n".join(["path,label", *rows]))
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "name: n\nsources: {raw: {csv: {root: raw, file: labels.csv}}}\nsets: {all: {source: raw, shard_samples: 2}}\n"
    )
    (built,) = build(load_spec(spec), tmp_path / "out", workers=workers)
    assert built.made == 3
    assert verify(built.folder, decode=True, workers=1) == []
    manifest = json.loads((built.folder / "manifest.json").read_text())
    assert manifest["class_names"] == ["a", "b"]
    assert ShardSet.open(str(built.folder)).class_counts.tolist() == [4, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_is_taken_is_refused_with_both_places(extension, kind):
    registry, name, ships = KINDS[kind]
    text = example(kind).replace(f'"{name}"', f'"{next(iter(registry))}"')
    file = extension(text, "taken.py")
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "register(" in line)
    with pytest.raises(UsageError) as caught:
        extensions.load_extensions()
    expected = f"{file}, line {line}: the {registry.kind} {next(iter(registry))!r} is already registered, by "
    assert caught.value.message.startswith(expected)
    assert f"{ships}, line " in caught.value.message


def test_a_size_cannot_take_the_name_of_a_resnet(extension):
    extension(example("A model size").replace("vit_tiny_mine", "resnet18"))
    with pytest.raises(UsageError, match="the model size 'resnet18' is already registered"):
        extensions.load_extensions()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mistake", ["x = 1 / 0", "x = ("])
def test_an_extension_that_fails_at_import_names_file_and_line(extension, kind, mistake):
    file = extension(f"x = 1\n{mistake}\n{example(kind)}", "broken.py")
    with pytest.raises(UsageError) as caught:
        extensions.load_extensions()
    assert f"{file}, line 2: " in caught.value.message
