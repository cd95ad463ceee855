"""`livt plan` from the command line: what scripts rely on, and mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from typer.testing import CliRunner

from livt_scale.cli import main
from livt_scale.plan.assumptions import accelerator, assumptions
from livt_scale.util.errors import UsageError

ROOT = Path(__file__).parents[2]
VIT_H = str(ROOT / "recipes" / "imagenet_lt" / "vit_h14.yaml")
VIT_B = VIT_H.replace("vit_h14", "vit_b16")
VIT_L = VIT_H.replace("vit_h14", "vit_l16")
PROBE = VIT_H.replace("vit_h14.yaml", "vit_b16_linear_probe.yaml")
QUICKSTART = str(Path(VIT_H).parents[1] / "fashion_mnist_lt" / "quickstart.yaml")
MINE = "name: mine\npeak_tflops: {bf16: 400, fp16: 400, fp32: 50}\nmemory_gib: 96\nmemory_gb_s: 3000\n"


def planned(*words, recipe=VIT_H):
    result = CliRunner().invoke(main.app, ["plan", recipe, "--json", *words], catch_exceptions=False)
    return json.loads(result.stdout)


def test_scripts_find_what_they_rely_on_and_fewer_gpus_take_longer():
    many, few = planned("--gpus", "64", "--strategy", "fsdp"), planned("--gpus", "8", "--strategy", "fsdp")
    assert many["params"] > 600e6
    assert set(many["memory_gib"]) >= {"weights", "grads", "optimizer", "activations", "peak"}
    assert many["fits"]
    assert many["segments"] >= 2
    assert 6 * many["hours"] < few["hours"] < 8 * many["hours"]
    # not an eighth quite: the first of 64 ranks has a row more of the head, and all of the tokens and positions
    assert few["memory_gib"]["optimizer"] == pytest.approx(8 * many["memory_gib"]["optimizer"], rel=0.05)


def test_a_time_limit_in_which_no_job_trains_gives_no_number_of_jobs():
    for stage in planned("--gpus", "64", "--time-limit", "0.14")["stages"]:
        assert stage["segments"] is None
        assert "makes no progress" in stage["segments_how"]


def test_a_plan_with_its_picture_needs_no_torch(tmp_path):
    picture = str(tmp_path / "plan.png")
    code = (
        "import sys\nfrom livt_scale.cli.main import main\n"
        f"sys.argv = ['livt', 'plan', {VIT_H!r}, '--gpus', '64', '--json', '--picture', {picture!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("more", [(), ("--exact",), ("--strategy", "auto")])
def test_a_resnet_is_refused_with_one_clear_error(more):
    recipe = str(Path(VIT_H).with_name("resnet50_scratch.yaml"))
    result = CliRunner().invoke(main.app, ["plan", recipe, "--gpus", "8", *more])
    assert isinstance(result.exception, UsageError)
    assert "model.size is resnet50, and a plan estimates the memory of ViTs only" in str(result.exception)


def test_a_stage_is_planned_at_its_own_resolution():
    """Pretraining at 128 px beside fine-tuning at 224, as of iNaturalist 2018."""
    smaller, whole = (
        planned("--gpus", "8", *sets)["stages"][0] for sets in (("--set=stages.pretrain.image_px=126",), ())
    )
    alone = planned("--gpus", "8", "--set=model.image_px=126", "--set=stages.finetune=null")["stages"][0]
    assert smaller["train_flops_per_image"] == alone["train_flops_per_image"] < whole["train_flops_per_image"] / 2
    assert smaller["memory_gib"] == alone["memory_gib"]


def test_what_does_not_fit_is_said_with_its_reason_and_the_best_fits(tmp_path):
    (tmp_path / "d.yaml").write_text(MINE.replace("96", "12") + "node_link_gb_s: 300\nnetwork_gb_s: 50\n")
    stage = planned("--gpus", "8", "--strategy", "auto", "--device", str(tmp_path / "d.yaml"))["stages"][0]
    assert stage["fits"]
    ddp = next(c for c in stage["candidates"] if c["strategy"] == "ddp")
    assert not ddp["fits"]
    assert "needs" in ddp["why_not"]
    fitting = [c for c in stage["candidates"] if c["fits"]]
    assert stage["best"]["hours"] <= min(c["hours"] for c in fitting) * 1.011


def test_an_assumption_that_is_changed_changes_the_plan_is_marked_and_has_no_range():
    before, after = planned("--gpus", "8"), planned("--gpus", "8", "--assume", "overhead=1.5")
    known = {"value": 1.5, "low": 1.5, "high": 1.5, "changed": True}
    assert after["assumptions"]["overhead"] == {**before["assumptions"]["overhead"], **known}
    assert after["hours"] == pytest.approx(2 * before["hours"], rel=0.01)
    assert after["hours_high"] / after["hours_low"] < before["hours_high"] / before["hours_low"]


def test_hours_are_a_range_and_all_stages_add_up():
    answer = planned("--gpus", "64", "--price-per-gpu-hour", "2")
    for name in ("hours_low", "hours", "hours_high"):
        assert answer[name] == pytest.approx(sum(s[name] for s in answer["stages"]))
    assert answer["hours_low"] < answer["hours"] < answer["hours_high"]
    assert answer["cost_low"] == pytest.approx(answer["hours_low"] * 64 * 2)
    assert answer["schema_version"] >= 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINE + "node_link_gb_s: 300\n", "network_gb_s"),
        (MINE + "node_link_gb_s: 300\nnetwork_gb: 50\n", "network_gb"),
        (MINE + "node_link_gb_s: fast\nnetwork_gb_s: 50\n", "node_link_gb_s"),
    ],
)
def test_a_device_file_with_a_mistake_is_told_by_field(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        accelerator(str(path))


def test_wrong_names_get_the_nearest_right_one():
    with pytest.raises(UsageError, match="h100"):
        accelerator("h10")
    with pytest.raises(UsageError, match="overhead"):
        assumptions(["overhed=1"])


@pytest.mark.parametrize("change", ["link_share=2", "cores_per_gpu=0", "decode_images_per_s=0", "overhead=-1"])
def test_an_impossible_assumption_is_refused_by_name(change):
    with pytest.raises(UsageError, match=change.partition("=")[0]):
        assumptions([change])


def test_without_loader_processes_the_training_process_decodes_between_steps():
    words = ("--gpus", "8", "--set=stages.finetune=null", "--strategy", "fsdp")
    none, some = (planned(*words, f"--set=data.workers={n}")["stages"][0] for n in (0, 8))
    assert none["limit"]["name"] == "decode"
    assert none["step_s"] > some["step_s"] + 512 / 400  # 512 images a rank, one core


@pytest.mark.parametrize(
    ("words", "limit", "lift"),
    [
        (("--gpus", "8", "--set=data.workers=2"), "decode", "data.workers="),
        (("--gpus", "8", "--assume", "cores_per_gpu=2"), "decode", "cores a GPU"),
        (("--gpus", "8", "--assume", "node_memory_gib=1", "--assume", "storage_gb_s=0.2"), "storage", "stage_in"),
        (("--gpus", "1024", "--set=parallel.compile=false", "--assume", "overhead=0"), "host", "compile=true"),
        (("--gpus", "64", "--device", "rtx4090"), "exchange", "network"),
        (
            (
                "--gpus",
                "8",
            ),
            "compute",
            "GPUs",
        ),
    ],
)
def test_the_limit_that_decides_is_named_with_what_lifts_it(words, limit, lift):
    stage = planned(*words, "--strategy", "ddp", "--set=stages.finetune=null", recipe=VIT_L)["stages"][0]
    assert stage["limit"]["name"] == limit
    assert lift in stage["limit"]["lift"]


def test_a_set_that_fits_the_nodes_memory_is_read_once_by_each_node():
    words = ("--gpus", "64", "--set=stages.finetune=null", "--images", "115846", "--classes", "1000")
    kept, read = (planned(*words, "--assume", f"node_memory_gib={n}")["stages"][0] for n in (512, 1))
    size = 115846 * 110 * 1024 / 1e12
    assert kept["read_tb"] == pytest.approx(8 * size, rel=0.01)
    assert read["read_tb"] == pytest.approx(1600 * size, rel=0.01)
    assert read["hours"] > kept["hours"] > kept["storage_wait_hours"] > 0


@pytest.mark.parametrize("recipe", ["vit_b16", "vit_h14", "vit_b16_linear_probe"])
@pytest.mark.parametrize(
    "words", [("--gpus", "64"), ("--gpus", "512", "--set=data.workers=1"), ("--device", "v100-16gb")]
)
def test_the_summary_is_at_most_20_lines_of_80_columns(recipe, words):
    words = [*words, *(() if "--gpus" in words else ("--gpus", "8"))]
    path = str(Path(VIT_H).with_name(f"{recipe}.yaml"))
    fp16 = "--set=parallel.precision=fp16"
    said = (
        CliRunner()
        .invoke(main.app, ["plan", path, *words, fp16, "--price-per-gpu-hour", "2"], catch_exceptions=False)
        .stdout.splitlines()
    )
    assert len(said) <= 20
    assert max(map(len, said)) <= 80
    assert any("bound: " in line for line in said)


def test_a_summary_with_every_remark_leaves_out_some_to_keep_to_20_lines(tmp_path):
    path = tmp_path / "a-device-with-a-rather-long-name-that-is-not-in-the-table.yaml"
    path.write_text(MINE.replace("mine", path.stem).replace("96", "7") + "node_link_gb_s: 3\nnetwork_gb_s: 2\n")
    words = ["plan", VIT_H, "--gpus", "512", "--device", str(path), "--strategy", "ddp", "--price-per-gpu-hour", "2"]
    said = CliRunner().invoke(main.app, words, catch_exceptions=False).stdout.splitlines()
    assert len(said) <= 20
    assert sum("does NOT fit" in line for line in said) == 2


def test_a_device_file_without_constants_gets_defaults_that_are_named_and_a_wider_range(tmp_path):
    rest = MINE + "node_link_gb_s: 300\nnetwork_gb_s: 50\n"
    (tmp_path / "bare.yaml").write_text(rest)
    (tmp_path / "known.yaml").write_text(rest + "constants: {family: ampere, multiprocessors: 108}\n")
    bare, known = (planned("--gpus", "8", "--device", str(tmp_path / f"{name}.yaml")) for name in ("bare", "known"))
    assert {"matmul", "memory", "multiprocessors"} <= set(bare["device_defaults"])
    assert known["device_defaults"] == []
    assert bare["hours_high"] / bare["hours_low"] > 1.3 * known["hours_high"] / known["hours_low"]
    said = CliRunner().invoke(main.app, ["plan", VIT_H, "--gpus", "8", "--device", str(tmp_path / "bare.yaml")]).stdout
    assert "matmul" in said


@pytest.mark.parametrize("constants", ["{familly: ampere}", "{matmul: 0}", "{matmul: fast}", "{family: amper}"])
def test_a_device_file_with_an_impossible_constant_is_refused(tmp_path, constants):
    (tmp_path / "d.yaml").write_text(MINE + f"node_link_gb_s: 300\nnetwork_gb_s: 50\nconstants: {constants}\n")
    with pytest.raises(UsageError, match="constants"):
        accelerator(str(tmp_path / "d.yaml"))


def test_a_tiny_model_is_told_in_units_in_which_it_is_something():
    words = ["plan", QUICKSTART, "--gpus", "1", "--images", "2478", "--classes", "10", "--details"]
    said = CliRunner().invoke(main.app, words, catch_exceptions=False).stdout.split("assumed, with")[0]
    amounts = re.findall(
        r"(?<![\d.])(\d+(?:\.\d+)?) (GiB|MiB|KiB|GB|MB|KB|TB|h|min|s|ms|µs|GFLOP|MFLOP|M parameters)\b", said
    )
    assert len(amounts) > 40
    allowed = {("0", "MB"), ("0", "µs"), ("0", "KiB")}  # one rank exchanges nothing, and has no buffers for it
    assert {(n, unit) for n, unit in amounts if float(n) == 0} <= allowed
    assert not re.search(r"[ =(]-\d", said)  # nothing is negative


def test_offload_frees_the_device_fills_the_host_and_takes_time():
    """ViT-H's states on 4 ranks of a node: 16 bytes a trained weight, 4 a fixed one, in the host's memory."""
    words = ["--gpus", "4", "--set=stages.finetune=null", "--set=parallel.activation_checkpointing=true"]
    here, away = (
        planned(*words, "--set=parallel.strategy=fsdp", f"--set=parallel.offload={where}")["stages"][0]
        for where in ("none", "cpu")
    )
    memory = away["memory_gib"]
    assert memory["weights"] == memory["grads"] == memory["optimizer"] == 0
    assert here["memory_gib"]["peak"] - memory["peak"] > 0.7 * 9.8 / 4  # all but what is gradients late in a step
    assert away["offloaded_gib_per_node"] == pytest.approx(16 * 657e6 / 2**30, rel=0.01)
    assert away["step_s"] > here["step_s"] + away["offload_s"] > here["step_s"] + 0.1
    ddp = [c for c in away["candidates"] if c["strategy"] == "ddp"]
    assert ddp == [c for c in here["candidates"] if c["strategy"] == "ddp"]  # cannot
    with pytest.raises(UsageError, match="on the device"):
        planned(*words, "--set=parallel.strategy=fsdp", "--set=parallel.offload=cpu", "--exact")


def test_a_linear_probe_has_gradients_and_one_moment_of_its_head_alone_and_no_zero():
    probe = planned("--gpus", "8", "--strategy", "ddp", recipe=PROBE)["stages"][0]
    head = 4 * (768 + 1) * 1000
    assert probe["params"] == pytest.approx(86.6e6, rel=0.01)
    assert probe["memory_gib"]["weights"] == pytest.approx(4 * probe["params"] / 2**30, rel=1e-3)
    assert probe["memory_gib"]["grads"] == probe["memory_gib"]["optimizer"] == pytest.approx(head / 2**30, abs=1e-4)
    assert probe["optimizer"] == "LARS"
    assert probe["checkpoint"]["bytes"] == pytest.approx(4 * probe["params"] + head, rel=0.01)
    assert {one["strategy"] for one in probe["candidates"]} == {"ddp", "fsdp"}
    whole = planned(
        "--gpus",
        "8",
        "--strategy",
        "ddp",
        "--set=stages.pretrain=null",
        "--set=stages.finetune.init=scratch",
        recipe=VIT_B,
    )["stages"][0]
    assert probe["train_flops_per_image"] == pytest.approx(whole["train_flops_per_image"] / 3, rel=0.01)
    with pytest.raises(UsageError, match="zero2 takes neither LARS nor a frozen backbone"):
        planned("--gpus", "8", "--strategy", "zero2", recipe=PROBE)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--images", "7"), "has 7 images, fewer than global_batch = 8"),
        (("--price-per-gpu-hour", "2"), "--price-per-gpu-hour is about times"),
        (("--set", "stages.finetune.train=bitfit", "--strategy", "zero2"), "takes neither LARS nor a frozen backbone"),
    ],
)
def test_a_model_of_timm_is_planned_under_the_rules_of_the_others(tmp_path, more, said):
    recipe = tmp_path / "recipe.yaml"
    stages = "{finetune: {init: weights, weights: none.safetensors, global_batch: 8, micro_batch: 4}}"
    recipe.write_text(
        f"name: t\ndata: {{train: gone}}\nmodel: {{timm: test_convnext, image_px: 32}}\nstages: {stages}\n"
    )
    with pytest.raises(UsageError, match=said):
        planned("--gpus", "2", "--images", "1000", "--classes", "5", *more, recipe=str(recipe))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "fsdp", "zero2"])
def test_a_model_of_timm_is_measured_and_has_no_hours(tmp_path, strategy):
    recipe = tmp_path / "recipe.yaml"
    stages = "{finetune: {init: weights, weights: none.safetensors, global_batch: 8, micro_batch: 4}}"
    recipe.write_text(
        f"name: t\ndata: {{train: gone}}\nmodel: {{timm: test_convnext, image_px: 32}}\nstages: {stages}\n"
    )
    words = ("--gpus", "2", "--images", "1000", "--classes", "5", "--strategy", strategy)
    answer = planned(*words, recipe=str(recipe))
    assert answer["params"] == sum(p.numel() for p in timm.create_model("test_convnext", num_classes=5).parameters())
    assert answer["train_flops_per_image"] > 2 * answer["params"]
    assert answer["fits"]
    assert answer["hours"] is None
    assert answer["stages"][0]["no_hours"]
    memory = answer["memory_gib"]
    assert memory["peak"] > memory["weights"] + memory["optimizer"]
    shown = CliRunner().invoke(main.app, ["plan", str(recipe), *words, "--picture", str(tmp_path / "x.png")])
    assert isinstance(shown.exception, UsageError)
