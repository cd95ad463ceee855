"""Which strategy is chosen, what is refused, what a rank holds; blocks recomputed and compiled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from pydantic import ValidationError

from livt_scale.config.recipe import Decoder, Model, Parallel
from livt_scale.distributed.blocks import blocks_of, prepare_blocks
from livt_scale.distributed.world import World
from livt_scale.distributed.wrap import choose, make_strategy
from livt_scale.models.mae import MaskedAutoencoder, build_mae
from livt_scale.optim import param_groups
from livt_scale.util.errors import UsageError

TINY = Model(
    size="vit_micro", width=32, heads=2, depth=2, image_px=28, channels=1, decoder=Decoder(width=32, depth=1, heads=2)
)


def a_mae(seed: int = 0) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return build_mae(TINY, norm_pix=True, mask_ratio=0.75)


def groups(model):
    return param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=None)


def some_images(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 1, 28, 28, generator=generator), torch.rand(batch, TINY.num_patches, generator=generator)


def loss_and_gradients(model: MaskedAutoencoder) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(*some_images())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_auto_is_the_simplest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, auto = a_mae(), Parallel()
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)  # the positions
    states = 16 * sum(p.numel() for p in model.parameters()) - 12 * frozen
    assert frozen > 0
    for memory, two in ((2 * states, "ddp"), (2 * states - 16, "fsdp")):
        host = SimpleNamespace(total=2 * memory)  # for two ranks
        monkeypatch.setattr(psutil, "virtual_memory", lambda host=host: host)
        assert choose(auto, model, world=World(0, 2, 0, 2)) == two
        assert choose(auto, model, world=World()) == "ddp"
    assert choose(Parallel(strategy="fsdp"), model, world=World(0, 2, 0, 2)) == "fsdp"


def test_shards_within_nodes_of_different_sizes_are_refused() -> None:
    hybrid = Parallel(strategy="fsdp", shard_within="node")
    with pytest.raises(UsageError, match="3 processes are not a multiple of the 2 on this node"):
        choose(hybrid, a_mae(), world=World(0, 3, 0, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "ddp", "offload": "cpu"}, "offload has no effect on strategy 'ddp'"),
        ({"strategy": "auto", "offload": "cpu"}, "offload has no effect on strategy 'auto'"),
        ({"strategy": "zero3", "offload": "nvme"}, "'none' or 'cpu'"),
        ({"strategy": "zero1", "shard_within": "node"}, "shard_within 'node' has no effect on strategy 'zero1'"),
        ({"precision": "fp8"}, "fp32"),
    ],
)
def test_what_would_have_no_effect_is_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Parallel(**fields)


def test_recomputed_blocks_give_the_same_gradients_and_names() -> None:
    plain, recomputed = a_mae(), a_mae()
    names = list(recomputed.state_dict())
    prepare_blocks(recomputed, recompute=True, compiled=False)
    calls = []
    for block in blocks_of(recomputed):
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, gradients = loss_and_gradients(recomputed)
    assert len(calls) == 2 * 3  # each of three blocks forward twice
    assert list(recomputed.state_dict()) == names
    expected_loss, expected = loss_and_gradients(plain)
    assert loss == expected_loss
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from within torch's compiler
def test_compiled_blocks_are_compiled_and_give_the_same_numbers() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain, compiled = a_mae(), a_mae()
    for block in blocks_of(compiled):
        block.compile(backend="aot_eager")  # the default needs a C++ compiler; what is compiled is the same
    loss, gradients = loss_and_gradients(compiled)
    assert counters["stats"]["unique_graphs"] > 0
    expected_loss, expected = loss_and_gradients(plain)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6)


def test_compile_reaches_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: compiled.append(self))
    model = a_mae()
    strategy = make_strategy(Parallel(compile=True), model, groups, betas=(0.9, 0.95), world=World())
    assert compiled == list(blocks_of(strategy.model))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    strategy = make_strategy(Parallel(), a_mae(), groups, betas=(0.9, 0.95), world=World())
    before = {name: tensor.clone() for name, tensor in strategy.state().items()}
    images, noise = some_images()
    images[0, 0, 3, 3] = float("inf")
    strategy.backward(strategy.call(images, noise, last=True), last=True)
    update = strategy.update(1e-3, max_norm=None)
    assert not update.applied
    assert not update.overflow
    assert all(torch.equal(tensor, before[name]) for name, tensor in strategy.state().items())
    assert all(p.grad is None for p in strategy.model.parameters())


def test_fp16_lowers_its_scale_and_then_says_that_it_is_not_the_scales_fault() -> None:
    strategy = make_strategy(Parallel(precision="fp16"), a_mae(), groups, betas=(0.9, 0.95), world=World())
    images, noise = some_images()
    strategy.backward(strategy.call(images, noise, last=True), last=True)
    assert strategy.update(1e-3, max_norm=None).applied
    scales = []
    for _ in range(17):
        loss = strategy.call(images, noise, last=True)
        strategy.backward(loss * float("inf"), last=True)
        update = strategy.update(1e-3, max_norm=None)
        assert not update.applied
        scales.append(strategy.scaler()["scale"])
    assert scales[0] == 2.0**15
    assert scales[:16] == [2.0**k for k in range(15, -1, -1)]
    assert not update.overflow  # at scale 1 the gradient itself is to blame
    other = make_strategy(Parallel(precision="fp16"), a_mae(), groups, betas=(0.9, 0.95), world=World())
    other.set_scaler(strategy.scaler())
    other.backward(other.call(images, noise, last=True), last=True)
    assert other.scaler() == strategy.scaler()


def test_clipping_scales_the_gradient_to_the_norm() -> None:
    images, noise = some_images()
    moments = {}
    for max_norm in (None, 1e-3):
        strategy = make_strategy(Parallel(), a_mae(), groups, betas=(0.9, 0.95), world=World())
        strategy.backward(strategy.call(images, noise, last=True), last=True)
        update = strategy.update(1e-3, max_norm=max_norm)
        moments[max_norm] = {n: t for n, t in strategy.state().items() if n.endswith("exp_avg")}
    factor = 1e-3 / update.grad_norm
    assert factor < 0.1
    for name, whole in moments[None].items():
        torch.testing.assert_close(moments[1e-3][name], whole * factor, rtol=1e-3, atol=1e-9)


def test_held_bytes_are_weights_gradients_and_both_moments(tmp_path: Path) -> None:
    strategy = make_strategy(Parallel(), a_mae(), groups, betas=(0.9, 0.95), world=World())
    trained = sum(p.numel() for p in strategy.model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in strategy.model.parameters() if not p.requires_grad)
    counts = sum(1 for p in strategy.model.parameters() if p.requires_grad)
    assert strategy.held_bytes() == 4 * (3 * trained + frozen + counts)
    strategy.backward(strategy.call(*some_images(), last=True), last=True)
    assert strategy.held_bytes() == 4 * (4 * trained + frozen + counts)
