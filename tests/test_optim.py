import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from livt_scale.config.recipe import Decoder, Model
from livt_scale.models.classifier import build_classifier
from livt_scale.models.mae import build_mae
from livt_scale.optim import lr_at, make_adamw, make_lars, make_sgd, param_groups, set_lr
from livt_scale.util.errors import UsageError

MICRO = Model(size="vit_micro", image_px=28, channels=1, decoder=Decoder(width=32, depth=2, heads=2))


def classifier_groups(layer_decay=0.75):
    model = build_classifier(MICRO, num_classes=10, drop_path=0.0)
    return model, param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)


def place_of(model, groups):
    """Name of each parameter -> its group."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


def test_layers_decay_as_published():
    model, groups = classifier_groups()
    place = place_of(model, groups)
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert place[name]["lr_scale"] == 0.75**5
    for k in range(4):
        assert place[f"blocks.{k}.attn.qkv.weight"]["lr_scale"] == 0.75 ** (4 - k)
        assert place[f"blocks.{k}.norm2.bias"]["lr_scale"] == 0.75 ** (4 - k)
    for name in ("fc_norm.weight", "head.weight", "head.bias"):
        assert place[name]["lr_scale"] == 1


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_matrices_decay_and_biases_norms_tokens_and_positions_do_not(stage):
    if stage == "pretrain":
        model = build_mae(MICRO, norm_pix=True, mask_ratio=0.75)
        groups = param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=None)
        assert [g["name"] for g in groups] == ["no_decay", "decay"]
    else:
        model, groups = classifier_groups()
    for name, group in place_of(model, groups).items():
        is_plain = name.endswith("bias") or "norm" in name or "token" in name or "pos_embed" in name
        assert group["weight_decay"] == (0.0 if is_plain else 0.05), name
        assert group["name"].endswith("no_decay") == is_plain


@pytest.mark.parametrize("layer_decay", [None, 0.65])
def test_each_trained_parameter_is_in_exactly_one_group_and_fixed_ones_in_none(layer_decay):
    model = build_mae(MICRO, norm_pix=True, mask_ratio=0.75)
    groups = param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len({g["name"] for g in groups}) == len(groups)


def test_the_groups_come_in_the_same_order_each_time():
    assert [g["name"] for g in classifier_groups()[1]] == [g["name"] for g in classifier_groups()[1]]


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod"])
def test_a_wrapped_model_has_the_groups_of_the_model(wrapper):
    model, groups = classifier_groups()
    outer = torch.nn.ModuleDict({"module": torch.nn.ModuleDict({wrapper: model})})  # as DDP of a compiled model
    wrapped = param_groups(outer, lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    assert [[id(p) for p in g.pop("params")] for g in wrapped] == [[id(p) for p in g.pop("params")] for g in groups]
    assert wrapped == groups


def test_frozen_blocks_leave_the_rates_of_the_others_as_they_are():
    model, groups = classifier_groups()
    rates = {g["name"]: g["lr"] for g in groups}
    model.blocks[:3].requires_grad_(False)
    rest = param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    assert len(rest) < len(groups)
    assert {g["name"]: g["lr"] for g in rest}.items() <= rates.items()


@pytest.mark.parametrize(
    ("argument", "value"), [("lr", 0.0), ("lr", math.nan), ("weight_decay", -1), ("layer_decay", 0), ("layer_decay", 2)]
)
def test_a_rate_out_of_range_names_the_argument(argument, value):
    values = {"lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.75} | {argument: value}
    with pytest.raises(UsageError, match=f"^{argument} is {value}"):
        param_groups(torch.nn.Linear(1, 1), **values)


def test_groups_that_would_train_nothing_are_refused():
    with pytest.raises(UsageError, match="no parameter to train"):
        param_groups(torch.nn.Linear(1, 1).requires_grad_(False), lr=1e-3, weight_decay=0)
    with pytest.raises(UsageError, match=r"layer_decay is 0\.75, and Linear"):
        param_groups(torch.nn.Linear(1, 1), lr=1e-3, weight_decay=0, layer_decay=0.75)


def test_every_group_has_a_rate_from_the_start_and_set_lr_scales_them():
    model, groups = classifier_groups()
    assert all(g["lr"] == 1e-3 * g["lr_scale"] > 0 for g in groups)
    optimizer = make_adamw(groups, betas=(0.9, 0.99))
    set_lr(optimizer, 0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1 * g["lr_scale"] for g in groups]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = model.head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.head.weight, before)


def test_a_step_of_adamw_is_the_papers():
    """Decoupled decay, bias-corrected moments: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, in float64."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = make_adamw([{"params": [weight], "weight_decay": 0.05, "lr_scale": 0.5}], betas=(0.9, 0.95))
    x, m, v = weight.detach().numpy().copy(), np.zeros(2), np.zeros(2)
    for t, grad in enumerate(([0.3, -0.1], [1.0, 0.2], [-0.5, 0.0]), start=1):
        weight.grad = torch.tensor(grad, dtype=torch.float64)
        set_lr(optimizer, 0.02)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * np.array(grad), 0.95 * v + 0.05 * np.array(grad) ** 2
        x = x - 0.01 * 0.05 * x
        x = x - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        np.testing.assert_allclose(weight.detach().numpy(), x, rtol=1e-12)


# Mean rates of some epochs in LiVT's public training logs. Those runs made `accumulation` micro-batches a step, set
# the rate at the first of them from the micro-batch's number, and averaged it over all micro-batches of the epoch.
PUBLIC = {  # (peak, epochs, warm-up, min, micro-batches an epoch, accumulation): {epoch: rate}
    "imagenet_lt pretrain": (6e-4, 800, 40, 0.0, 113, 1, {0: 7.43363e-06, 39: 5.92434e-04, 799: 8.65737e-10}),
    "imagenet_lt finetune": (1e-3, 100, 5, 1e-6, 905, 4, {0: 9.95584e-05, 40: 6.93581e-04, 99: 1.09164e-06}),
    "imagenet_lt finetune 384": (2e-3, 100, 5, 1e-6, 905, 8, {0: 1.98234e-04, 39: 1.41719e-03, 99: 1.18459e-06}),
    "inat18 pretrain": (1.8e-3, 800, 40, 0.0, 569, 4, {0: 2.2342e-05, 99: 1.77292e-03, 799: 2.59018e-09}),
    "inat18 finetune": (8e-3, 100, 5, 1e-6, 1709, 8, {0: 7.96259e-04, 40: 5.54652e-03, 99: 1.73405e-06}),
    "inat18 finetune 384": (4e-3, 100, 5, 1e-6, 854, 2, {1: 1.19906e-03, 39: 2.83389e-03, 99: 1.3657e-06}),
}  # fmt: skip


@pytest.mark.parametrize("run", PUBLIC)
def test_the_schedule_gives_the_rates_of_the_public_logs(run):
    peak, epochs, warmup, low, micros, accumulation, rates = PUBLIC[run]
    for epoch, logged in rates.items():
        of_micro = [
            lr_at(
                epoch * micros + i // accumulation * accumulation,
                steps_per_epoch=micros,
                epochs=epochs,
                warmup_epochs=warmup,
                peak_lr=peak,
                min_lr=low,
            )
            for i in range(micros)
        ]
        assert np.mean(of_micro) == pytest.approx(logged, rel=5e-6)


def test_the_schedules_corners():
    run = {"steps_per_epoch": 10, "epochs": 5, "warmup_epochs": 1, "peak_lr": 1.0, "min_lr": 0.1}
    assert lr_at(0, **run) == 0
    assert lr_at(5, **run) == 0.5
    assert lr_at(10, **run) == 1
    assert lr_at(30, **run) == pytest.approx(0.55)
    assert lr_at(50, **run) == lr_at(60, **run) == 0.1
    assert lr_at(0, **{**run, "warmup_epochs": 0}) == 1
    assert lr_at(49, **{**run, "warmup_epochs": 5}) == pytest.approx(0.98)


@settings(max_examples=50, deadline=None)
@given(
    step=st.integers(0, 2_000_000),
    steps_per_epoch=st.integers(1, 10_000),
    epochs=st.integers(1, 1600),
    share=st.floats(0, 1),
)
def test_the_rate_is_finite_and_between_its_ends(step, steps_per_epoch, epochs, share):
    rate = lr_at(
        step,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        warmup_epochs=share * epochs,
        peak_lr=1e-3,
        min_lr=0.0,
    )
    assert math.isfinite(rate)
    assert 0 <= rate <= 1e-3


def test_tokens_decay_in_pretraining_as_in_the_public_code_and_not_in_fine_tuning():
    """Pretraining: timm's add_weight_decay spares one-dim tensors alone; fine-tuning: cls_token and pos_embed too."""
    model = build_mae(MICRO, norm_pix=True, mask_ratio=0.75)

    def decaying(**options: bool) -> set[str]:
        groups = param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=None, **options)
        chosen = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        return {name for name, p in model.named_parameters() if id(p) in chosen}

    assert decaying(tokens_decay=True) == {n for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
    assert decaying(tokens_decay=True) - decaying() == {"cls_token", "mask_token"}


def test_steps_of_sgd_are_torchs_and_its_momentum_is_there_from_the_start():
    torch.manual_seed(0)
    model, plain = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    plain.load_state_dict(model.state_dict())
    optimizer = make_sgd(param_groups(model, lr=1e-3, weight_decay=0.1, layer_decay=None), momentum=0.9)
    assert {name for state in optimizer.state.values() for name in state} == {"momentum_buffer"}
    reference = torch.optim.SGD(
        [{"params": [plain.weight], "weight_decay": 0.1}, {"params": [plain.bias]}], lr=0.1, momentum=0.9
    )
    set_lr(optimizer, 0.1)
    for _ in range(3):
        images = torch.randn(4, 3)
        for net, steps in ((model, optimizer), (plain, reference)):
            steps.zero_grad()
            net(images).square().sum().backward()
            steps.step()
    torch.testing.assert_close(model.weight, plain.weight)
    torch.testing.assert_close(model.bias, plain.bias)


def test_a_step_of_lars_is_maes():
    """util/lars.py of the MAE code: matrices are scaled by 0.001 · |w| / |g|, biases are not, in float64."""
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 0.1]], dtype=torch.float64))
    bias = torch.nn.Parameter(torch.tensor([0.3, -0.4], dtype=torch.float64))
    model = torch.nn.Module()
    model.weight, model.bias = weight, bias
    optimizer = make_lars(param_groups(model, lr=1e-3, weight_decay=0.0, layer_decay=None), momentum=0.9)
    w, b = weight.detach().numpy().copy(), bias.detach().numpy().copy()
    of_w, of_b = np.zeros_like(w), np.zeros_like(b)
    for step in range(3):
        rng = np.random.default_rng(step)
        g, h = rng.normal(size=w.shape), rng.normal(size=b.shape)
        weight.grad, bias.grad = torch.from_numpy(g), torch.from_numpy(h)
        set_lr(optimizer, 6.4)
        optimizer.step()
        of_w = 0.9 * of_w + 0.001 * np.linalg.norm(w) / np.linalg.norm(g) * g
        of_b = 0.9 * of_b + h
        w, b = w - 6.4 * of_w, b - 6.4 * of_b
        np.testing.assert_allclose(weight.detach().numpy(), w, rtol=1e-6)  # timm adds 1e-8 to the norm
        np.testing.assert_allclose(bias.detach().numpy(), b, rtol=1e-12)
