"""A linear probe's network: what it trains, what it normalises by, and the plain network that it ends as."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from livt_scale.config.recipe import Model
from livt_scale.config.tuning import TrainHead
from livt_scale.models.classifier import Classifier
from livt_scale.models.layers import vit_args
from livt_scale.models.parameter_efficient import build_tuned

MICRO = Model(size="vit_micro", depth=2, image_px=28, channels=1)


def a_probe(*, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    model = build_tuned(MICRO, num_classes=10, drop_path=0.0, tuning=TrainHead(), head_norm=True)
    with torch.no_grad():
        for parameter in model.parameters():  # another fc_norm than the one that changes nothing
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def images(step: int, number: int = 6) -> Tensor:
    return torch.randn(number, 1, 28, 28, generator=torch.Generator().manual_seed(step))


def features(model: Classifier, given: Tensor) -> Tensor:
    """What the head would be given without the statistics, by timm's own code."""
    with torch.no_grad():
        return super(Classifier, model).forward_head(model.forward_features(given), pre_logits=True)


def after_steps(model: Classifier) -> Tensor:
    """Two steps of unequal micro-batches, one that was not taken, and half of one more: what the two have shown."""
    model.train()
    for step, parts in ((0, (6, 2)), (1, (3, 5))):
        for k, number in enumerate(parts):
            model(images(10 * step + k, number))
        model.head_norm.settle(keep=True)
    model(images(50))
    model.head_norm.settle(keep=False)
    model(images(60))
    return torch.cat([features(model, images(seed, n)) for seed, n in ((0, 6), (1, 2), (10, 3), (11, 5))])


def test_the_head_alone_has_gradients_and_it_starts_as_maes_probe_does() -> None:
    torch.manual_seed(0)
    model = build_tuned(MICRO, num_classes=1000, drop_path=0.0, tuning=TrainHead())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert 0.0095 < model.head.weight.std().item() < 0.0105
    model(images(0)).sum().backward()
    assert all((p.grad is not None) == name.startswith("head.") for name, p in model.named_parameters())


def test_it_is_batch_norm_without_weights_over_the_images_of_the_steps_taken() -> None:
    model = a_probe()
    seen = after_steps(model)
    reference = nn.BatchNorm1d(96, eps=1e-6, affine=False).double().eval()
    reference.running_mean, reference.running_var = seen.double().mean(0), seen.double().var(0, unbiased=False)
    expected = reference(features(model, images(99)).double())
    for mode in (True, False):
        model.train(mode)
        given = model.forward_head(model.forward_features(images(99)), pre_logits=True)
        torch.testing.assert_close(given.detach().double(), expected, rtol=1e-4, atol=1e-4)
    assert model.head_norm.sums[0].unique().tolist() == [16]


def test_the_first_step_goes_without() -> None:
    model = a_probe().train()
    given = model.forward_head(model.forward_features(images(0)), pre_logits=True)
    torch.testing.assert_close(given, features(model, images(0)), rtol=1e-6, atol=1e-6)


def test_a_feature_that_never_changes_stays_finite() -> None:
    model = a_probe()
    with torch.no_grad():
        model.fc_norm.weight[7] = 0
    after_steps(model)
    given = model.eval().forward_head(model.forward_features(images(99)), pre_logits=True)
    assert torch.isfinite(given).all()
    assert given[:, 7].abs().max() < 1e-3


def test_folded_it_is_a_plain_network_with_the_same_logits_bit_for_bit() -> None:
    model = a_probe()
    after_steps(model)
    with torch.inference_mode():
        live = model.eval()(images(99))
        model.fold_head_norm()
        plain = timm.models.vision_transformer.VisionTransformer(**vit_args(MICRO), num_classes=10, global_pool="avg")
        plain.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(model(images(99)), live)
        assert torch.equal(plain.eval()(images(99)), live)


def test_evaluation_counts_nothing() -> None:
    model = a_probe()
    after_steps(model)
    before = model.head_norm.of_step.clone()
    model.eval()(images(1))
    assert torch.equal(model.head_norm.of_step, before)
