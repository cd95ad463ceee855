"""`livt plan --calibrate`: measured times replace planned ones, narrow the range, and must be of the same network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from livt_scale.cli import main
from livt_scale.config.load import load_recipe
from livt_scale.plan.flops import stage_flops
from livt_scale.util.errors import UsageError

RECIPES = Path(__file__).parents[2] / "recipes" / "imagenet_lt"
SETS = ("--set=parallel.strategy=ddp", "--set=data.workers=64", "--assume", "cores_per_gpu=64")


def planned(*words, size="vit_b16"):
    result = CliRunner().invoke(
        main.app, ["plan", str(RECIPES / f"{size}.yaml"), "--json", *SETS, *words], catch_exceptions=False
    )
    return json.loads(result.stdout)


def a_run(folder, *, step_s, wait_s=0.0, world_size=8, peak=989.5, sets=()):
    """metrics.jsonl of a run that took `step_s`, on devices of `peak` TFLOP/s."""
    source = RECIPES / "vit_b16.yaml"
    recipe = load_recipe(source, sets=["parallel.strategy=ddp", *sets])
    (folder / "pretrain").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    rate = 4096 / step_s
    mfu = stage_flops(recipe, "pretrain", num_classes=1000).train * rate / world_size / (peak * 1e12)
    common = {"images_per_s": rate, "data_wait_s": wait_s, "mfu": mfu, "world_size": world_size}
    lines = [{"step": step, "step_s": step_s * (9 if step == 1 else 1), **common} for step in range(1, 8)]
    path = folder / "pretrain" / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_run_scales_the_times_and_narrows_the_range(tmp_path):
    plain = planned("--gpus", "8")
    busy = sum(plain["stages"][0][part] for part in ("compute_s", "exposed_exchange_s", "optimizer_s"))
    path = a_run(tmp_path, step_s=1.3 * busy + 0.5, wait_s=0.5)
    answer = planned("--gpus", "8", "--calibrate", str(path))
    first, second = answer["stages"]
    assert first["compute_s"] == pytest.approx(1.3 * plain["stages"][0]["compute_s"], rel=0.01)
    assert first["calibration"]["scale"] == pytest.approx(1.3, rel=0.01)
    width, before = (
        first["hours_high"] / first["hours_low"],
        plain["stages"][0]["hours_high"] / plain["stages"][0]["hours_low"],
    )
    assert first["calibration"]["width"] == pytest.approx(width)
    assert first["calibration"]["width_before"] == pytest.approx(before)
    assert width < 1.4 < before
    assert width < second["hours_high"] / second["hours_low"]
    assert (
        "calibrated: "
        in CliRunner()
        .invoke(main.app, ["plan", str(RECIPES / "vit_b16.yaml"), *SETS, "--gpus", "8", "--calibrate", str(path)])
        .stdout
    )


def test_lines_of_another_number_of_ranks_are_not_taken_for_the_last_ones(tmp_path):
    path = a_run(tmp_path / "run", step_s=0.5, world_size=16)
    path.write_text(2 * path.read_text() + a_run(tmp_path / "fewer", step_s=1.0, world_size=8).read_text())
    answer, expected = (
        planned("--gpus", "8", "--calibrate", str(tmp_path / name / "pretrain" / "metrics.jsonl"))
        for name in ("run", "fewer")
    )
    assert answer["stages"][0]["calibration"]["scale"] == expected["stages"][0]["calibration"]["scale"]


@pytest.mark.parametrize(
    ("run", "words", "said"),
    [
        ({}, {"size": "vit_l16"}, "model"),
        ({"peak": 312}, {}, "312 TFLOP/s"),
        ({"sets": ["parallel.precision=fp32"]}, {}, "precision"),
    ],
)
def test_a_run_of_another_network_or_device_is_refused(tmp_path, run, words, said):
    path = a_run(tmp_path, step_s=0.1, **run)
    with pytest.raises(UsageError, match=said):
        planned("--gpus", "8", "--calibrate", str(path), **words)


@pytest.mark.parametrize("text", ["", "{}\n", "no json\n", '{"step": 1, "step_s": 1.0, "world_size": 8}\n'])
def test_a_file_that_measures_nothing_is_refused(tmp_path, text):
    path = a_run(tmp_path, step_s=0.1)
    path.write_text(text)
    with pytest.raises(UsageError, match="--calibrate"):
        planned("--gpus", "8", "--calibrate", str(path))


def gpu_lines(path, *, device="NVIDIA H100 80GB HBM3", name="ViT-B compiled", gflop=None, step_s=0.25):
    recipe = load_recipe(RECIPES / "vit_b16.yaml")
    flops = stage_flops(recipe, "pretrain", num_classes=1000).train
    lines = [
        {"part": "ceilings", "name": "machine", "device": device},
        {
            "part": "mfu",
            "name": name,
            "batch": 1024,
            "step_s": step_s,
            "gflop_per_image": gflop or round(flops / 1e9, 1),
        },
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_the_figures_of_a_gpu_are_taken(tmp_path):
    slow, fast = (
        planned("--gpus", "8", "--calibrate", gpu_lines(tmp_path / "gpu.jsonl", step_s=step_s))
        for step_s in (0.5, 0.25)
    )
    assert slow["stages"][0]["compute_s"] == pytest.approx(2 * fast["stages"][0]["compute_s"])


@pytest.mark.parametrize(
    "more",
    [
        {"device": "NVIDIA A100-SXM4-80GB"},
        {"device": "llvmpipe"},
        {"name": "ViT-B eager"},
        {"gflop": 122.8},
        {"gflop": "many"},
        {"step_s": "long"},
    ],
)
def test_figures_of_another_gpu_or_network_are_refused(tmp_path, more):
    with pytest.raises(UsageError, match="--calibrate"):
        planned("--gpus", "8", "--calibrate", gpu_lines(tmp_path / "gpu.jsonl", **more))
