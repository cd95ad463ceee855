"""One of two ranks: train a step by each strategy; rank 0 prints what weights, gradients and moments hold, as JSON."""

from __future__ import annotations

import json
import sys

import torch

from livt_scale.config.recipe import Model, Parallel
from livt_scale.distributed.world import detect, process_group
from livt_scale.distributed.wrap import make_strategy
from livt_scale.models.mae import build_mae
from livt_scale.optim import param_groups


def main() -> None:
    torch.set_num_threads(1)
    world, model, found = detect(), Model(size="vit_ti", image_px=64), {}
    with process_group(world, timeout_s=120):
        for name in sys.argv[1:]:
            network = build_mae(model, norm_pix=True, mask_ratio=0.75)

            def groups(net):
                return param_groups(net, lr=1e-3, weight_decay=0.05, layer_decay=None)

            strategy = make_strategy(Parallel(strategy=name), network, groups, betas=(0.9, 0.95), world=world)
            loss = strategy.call(torch.rand(2, 3, 64, 64), torch.rand(2, model.num_patches), last=True)
            if not name.startswith("zero"):
                strategy.state()  # moments, which the first step would make; the zeros have them
            strategy.backward(loss, last=True)
            found[name] = strategy.held_bytes()
        if world.is_main:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
