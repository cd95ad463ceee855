"""The plain re-statement that our step is timed against computes what our step computes."""

import json
from pathlib import Path

import pytest
import torch

from livt_scale.config.recipe import Decoder, Model
from tests.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step.py"
SMALL = Model(size="vit_micro", image_px=28, channels=3, decoder=Decoder(width=32, depth=1, heads=2))


@pytest.fixture(scope="module")
def benchmark():
    return load_script(SCRIPT)


def contenders(benchmark):
    return benchmark.contenders(SMALL, device=torch.device("cpu"), precision="fp32")


def test_both_have_the_same_losses_over_steps_that_learn(benchmark):
    runners = contenders(benchmark)
    start = {name: weight.clone() for name, weight in runners["ours"].model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(2, 3, 28, 28, generator=generator), torch.rand(2, 49, generator=generator)

    found = benchmark.measure(runners, draw, steps=3)
    assert found["loss"]["largest_relative_difference"] < 1e-5
    assert set(found["step_s"]) == {"ours", "reference"}
    json.dumps(found, allow_nan=False)
    for runner in runners.values():
        for name, weight in runner.model.named_parameters():
            assert torch.equal(weight, start[name]) != weight.requires_grad, name


def test_both_have_the_same_gradients(benchmark):
    images, noise = torch.randn(2, 3, 28, 28), torch.rand(2, 49)
    gradients = []
    for runner in contenders(benchmark).values():
        runner.model(images, noise).backward()
        gradients.append({name: p.grad for name, p in runner.model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_different_computation_is_noticed(benchmark):
    runners = contenders(benchmark)
    with torch.no_grad():
        runners["reference"].model.mask_token.normal_()
    draws = torch.randn(2, 3, 28, 28), torch.rand(2, 49)
    found = benchmark.measure(runners, lambda: draws, steps=1)
    assert found["loss"]["largest_relative_difference"] > benchmark.TOLERANCE["fp32"]
