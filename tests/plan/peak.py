"""One of two ranks: the peak of a strategy's second step, as torch's allocator counts it, beside the planned one; JSON.

python peak.py zero2 kept        # or recomputed; under RANK, WORLD_SIZE, …
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Model, Parallel
from livt_scale.distributed.world import detect, process_group
from livt_scale.distributed.wrap import make_strategy
from livt_scale.models.mae import build_mae
from livt_scale.optim import param_groups
from livt_scale.plan.memory import Spread, plan_memory
from livt_scale.plan.parameters import weights_of

IMAGES = 64
MODEL = Model(size="vit_ti", image_px=64)
RECIPE = Path(__file__).parents[2] / "recipes" / "imagenet_lt" / "vit_b16.yaml"
SECOND = "the second step"  # the first one makes moments and buffers


def train(strategy) -> None:
    for name in ("the first step", SECOND):
        with record_function(name):
            images, noise = torch.rand(IMAGES, 3, 64, 64), torch.rand(IMAGES, MODEL.num_patches)
            strategy.backward(strategy.call(images, noise, last=True), last=True)
            strategy.update(1e-4, max_norm=None)


def peak_of_the_second_step(prof) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    start = max(e["ts"] for e in events if e.get("name") == SECOND)
    return max(e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]" and e["ts"] >= start)


def main() -> None:
    name, recompute = sys.argv[1], sys.argv[2] == "recomputed"
    torch.set_num_threads(1)
    world = detect()

    def groups(net):
        return param_groups(net, lr=1e-3, weight_decay=0.05, layer_decay=None)

    parallel = Parallel(strategy=name, activation_checkpointing=recompute)
    with process_group(world, timeout_s=120):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
            network = build_mae(MODEL, norm_pix=True, mask_ratio=0.75)
            train(make_strategy(parallel, network, groups, betas=(0.9, 0.95), world=world))
        if world.is_main:
            recipe = load_recipe(RECIPE).model_copy(update={"model": MODEL})
            spread = Spread(name, world.world_size, "fp32", IMAGES, recompute=recompute)
            planned = plan_memory(recipe, "pretrain", weights_of(MODEL, "pretrain", num_classes=1), spread)
            print(json.dumps({"measured": peak_of_the_second_step(prof), "planned": planned.peak}), flush=True)


if __name__ == "__main__":
    main()
