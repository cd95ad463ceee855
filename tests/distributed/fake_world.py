"""One rank of a process group whose other ranks are not there: fake_world.py RANKS LOCAL; a JSON line of results.

Collectives return at once and move nothing, so numbers mean nothing; shapes, meshes and what is exchanged are those of
the real run. The line has, by "SHARDED_WITHIN STAGE PRECISION", the collectives of a step of two micro-batches.
DDP cannot run so: its exchange, in C++, takes the fake one for an error.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from livt_scale import optim
from livt_scale.config.recipe import Decoder, Ema, Model, Parallel
from livt_scale.distributed.world import World
from livt_scale.distributed.wrap import make_strategy
from livt_scale.models.classifier import build_classifier
from livt_scale.models.mae import build_mae

MODEL = Model(size="vit_ti", depth=4, image_px=64, decoder=Decoder(width=64, depth=2, heads=2))


def collectives(within: str, stage: str, precision: str, *, world: World) -> dict[str, int]:
    """How many of each kind a step has."""
    torch.manual_seed(0)
    if stage == "pretrain":
        model = build_mae(MODEL, norm_pix=True, mask_ratio=0.75)
    else:
        model = build_classifier(MODEL, num_classes=10, drop_path=0.1)
    parallel = Parallel(strategy="fsdp", shard_within=within, precision=precision, activation_checkpointing=True)
    made = make_strategy(
        parallel,
        model,
        lambda m: optim.param_groups(m, lr=1e-3, weight_decay=0.05, layer_decay=None),
        betas=(0.9, 0.95),
        world=world,
        ema=Ema(decay=0.9),
    )
    with CommDebugMode() as debug:
        for last in (False, True):
            noise = torch.rand(2, MODEL.num_patches if stage == "pretrain" else 2 * MODEL.dims.depth)
            out = made.call(torch.randn(2, 3, 64, 64), noise, last=last)
            made.backward(out.float().square().mean(), last=last)
        made.update(1e-3, max_norm=1.0)
    made.state()
    return {str(kind).rpartition(".")[2]: count for kind, count in debug.get_comm_counts().items()}


def main() -> None:
    ranks, local = map(int, sys.argv[1:])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    world = World(0, ranks, local_rank=0, local_size=local)
    print(
        json.dumps(
            {
                f"{within} {stage} {precision}": collectives(within, stage, precision, world=world)
                for within in ("all", "node")
                for stage in ("pretrain", "finetune")
                for precision in ("bf16", "fp16")
            }
        )
    )


if __name__ == "__main__":
    main()
