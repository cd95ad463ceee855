"""Methods that train a few parameters: which, what they start as, and the plain network that some of them end as."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Model
from livt_scale.config.tuning import (
    TUNINGS,
    AdaptFormer,
    BitFit,
    Lora,
    TrainAll,
    TrainHead,
    TrainNorms,
    Tuning,
    Vpt,
)
from livt_scale.models.classifier import AnyClassifier, build_classifier, head_name
from livt_scale.models.parameter_efficient import ImageDropout, build_tuned, merge, tune
from livt_scale.plan.parameters import stage_weights
from livt_scale.util.errors import UsageError
from tests.timm_families import family
from tests.whole_runs import REPO

MICRO = Model(size="vit_micro", depth=2, image_px=28, channels=1)
METHODS: dict[str, Tuning] = {
    "head": TrainHead(),
    "lora": Lora(),
    "lora of some": Lora(rank=3, alpha=5, targets=("attn.qkv", "fc2")),
    "adaptformer": AdaptFormer(bottleneck=5),
    "vpt": Vpt(prompts=3),
    "bitfit": BitFit(),
    "layernorm": TrainNorms(),
}
QUICKSTART = REPO / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"


def images(number: int = 3) -> Tensor:
    return torch.randn(number, 1, 28, 28, generator=torch.Generator().manual_seed(number))


def random_classifier(model: Model = MICRO) -> AnyClassifier:
    torch.manual_seed(0)
    classifier = build_classifier(model, num_classes=10, drop_path=0.0)
    _move(classifier)
    return classifier.eval()


@torch.no_grad()
def _move(classifier: AnyClassifier) -> None:
    """Change every trained parameter, as training would."""
    for parameter in classifier.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def test_every_method_is_tried_here():
    assert {tuning.name for tuning in METHODS.values()} | {"all"} == set(TUNINGS)


@pytest.mark.parametrize("tuning", METHODS.values(), ids=METHODS)
def test_it_starts_as_the_plain_network_and_trains_what_the_plan_counts(tuning):
    model = random_classifier()
    before = model(images())
    tune(model, tuning)
    if not isinstance(tuning, Vpt):  # whose tokens take part in attention from the start
        torch.testing.assert_close(model.eval()(images()), before, rtol=0, atol=0)
    sets = ["stages.pretrain=null", "stages.finetune.init=weights", "stages.finetune.weights=w"]
    sets += ["stages.finetune.layer_decay=1", "stages.finetune.drop_path=0", "model.depth=2", "model.patch_px=4"]
    recipe = load_recipe(QUICKSTART, sets=[*sets, f"stages.finetune.train={tuning.model_dump_json()}"])
    planned = stage_weights(recipe, "finetune", num_classes=10)
    real = {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}
    assert {w.name: (w.shape, w.trained) for w in planned} == real
    assert all(real[f"head.{name}"][1] for name in ("weight", "bias"))
    model.train()(images(), torch.rand(3, 4)).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {n for n in real if real[n][1]}


@pytest.mark.parametrize("tuning", [t for t in METHODS.values() if t.merges], ids=lambda tuning: tuning.name)
def test_merged_it_is_a_plain_network_with_the_same_logits(tuning):
    model = random_classifier()
    names = list(model.state_dict())
    tune(model, tuning)
    _move(model)
    before = model.eval()(images())
    merge(model, tuning)
    after = model(images())
    assert list(model.state_dict()) == names
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_lora_is_the_sum_of_two_products():
    """The reference: W x + (α / r) · B A x, with the matrices in their own names."""
    model = build_tuned(MICRO, num_classes=10, drop_path=0.0, tuning=Lora(rank=3, alpha=5, targets=("fc1",)))
    _move(model)
    layer, x = model.blocks[1].mlp.fc1, torch.randn(2, 7, 96)
    state = {name.removeprefix("blocks.1.mlp.fc1."): tensor for name, tensor in model.state_dict().items()}
    update = state["lora_B.default.weight"] @ state["lora_A.default.weight"] * 5 / 3
    weight = state["base_layer.weight"] + update
    torch.testing.assert_close(layer(x), x @ weight.T + state["base_layer.bias"])


def test_prompts_are_between_the_class_token_and_the_patches_and_not_in_the_mean():
    model = random_classifier()
    tune(model, Vpt(prompts=3))
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    last = model.forward_features(images())
    assert seen[0].shape == (3, 1 + 3 + 49, 96)
    assert torch.equal(seen[0][1, 1:4], model.norm_pre.prompts[0])
    torch.testing.assert_close(model.pool(last), last[:, 4:].mean(1))


@pytest.fixture
def dropping() -> AnyClassifier:
    torch.manual_seed(0)
    model = build_tuned(MICRO, num_classes=10, drop_path=0.2, tuning=Lora(dropout=0.5))
    _move(model)
    return model.train()


def test_dropout_follows_from_the_images_own_number(dropping: AnyClassifier):
    x, drop = images(4), torch.rand(4, 5)
    once = dropping(x, drop)
    assert torch.equal(once, dropping(x, drop))  # no generator is drawn from
    torch.testing.assert_close(dropping(x[1:3], drop[1:3]), once[1:3])
    other = torch.cat([drop[:, :4], torch.rand(4, 1)], dim=1)
    assert not torch.allclose(once, dropping(x, other))
    assert torch.equal(dropping.eval()(x, drop), dropping(x))


def test_dropout_leaves_out_its_rate_of_the_values_and_keeps_the_mean():
    dropout = ImageDropout(0.3, salt=5).train()
    dropout.seeds = torch.tensor([3, 4])
    out = dropout(torch.ones(2, 50, 1000))
    assert (out == 0).float().mean() == pytest.approx(0.3, abs=0.01)
    assert out.mean() == pytest.approx(1, abs=0.01)
    assert (out[0] == out[1]).float().mean() < 0.62  # independent: 0.58


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("dinov2", {"qkv", "proj", "fc1", "fc2"}), ("convnext", {"fc1", "fc2"})])
def test_lora_of_another_model_of_timm_is_beside_its_linear_layers(name, layers):
    model = random_classifier(family(name))
    x = torch.randn(2, *model.image_shape)
    before = model(x)
    tune(model, Lora())
    adapted = {path.rpartition(".")[2] for path, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == layers
    assert not hasattr(model.get_submodule(head_name(model)), "lora_A")
    _move(model)
    after = model.eval()(x)
    assert not torch.allclose(after, before)
    merge(model, Lora())
    torch.testing.assert_close(model(x), after, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_layer_that_a_model_of_timm_does_not_call_is_refused():
    with pytest.raises(UsageError, match="qkv of this model of timm is not called as a layer") as caught:
        build_tuned(family("eva02"), num_classes=5, drop_path=0.0, tuning=Lora())
    assert str(caught.value.remedy) == "set targets: [proj, fc1, fc2]"
    model = build_tuned(family("eva02"), num_classes=5, drop_path=0.0, tuning=Lora(targets=("proj", "fc1", "fc2")))
    model(torch.randn(2, *model.image_shape)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("train", ["{name: lora, targets: [qkw]}", "{name: lora, targets: [qkv, fc3]}"])
def test_a_target_that_matches_nothing_names_the_linear_layers(train):
    sets = ["stages.finetune.layer_decay=1", f"stages.finetune.train={train}"]
    with pytest.raises(Exception, match=r"matches no linear layer of the model\. It has qkv, proj, fc1, fc2") as caught:
        load_recipe(QUICKSTART, sets=sets)
    assert "stages.finetune.train: targets: 'qkw'" in str(caught.value) or "'fc3'" in str(caught.value)


def test_a_method_without_a_place_in_the_model_is_refused():
    for tuning in (Vpt(), AdaptFormer()):
        with pytest.raises(UsageError, match=tuning.name):
            build_tuned(family("efficientnet"), num_classes=5, drop_path=0.0, tuning=tuning)


def test_a_frozen_backbone_does_not_begin_from_scratch():
    with pytest.raises(Exception, match="'lora', so the backbone of init 'scratch' would stay random"):
        load_recipe(QUICKSTART, sets=["stages.finetune.init=scratch", "stages.finetune.train=lora"])


def test_an_option_of_another_method_is_named():
    from livt_scale.config.stages import Finetune

    with pytest.raises(ValidationError, match="take lora"):
        Finetune.model_validate({"train": {"name": "vpt", "rank": 3}})
    assert Finetune.model_validate({"train": "lora"}).train == Lora()
    assert Finetune().model_dump(mode="json")["train"] == TrainAll().name


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        build_tuned(MICRO, num_classes=10, drop_path=0.0, tuning=Lora())
    assert "livt-scale[peft]" in str(caught.value.remedy)
