"""Real checkpoints by DeepSpeed's own engine, one rank's part: deepspeed_ranks.py FOLDER RANK WORLD_SIZE STAGE...

Trains a small uneven network three steps under each ZeRO STAGE, saves it the way DeepSpeed does into FOLDER/zeroSTAGE,
and leaves what plain torch makes of the same batches in one process, by plain name, in FOLDER/zeroSTAGE.safetensors.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": sys.argv[2]}

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its compilation takes 90 s, and nothing here needs it


class Net(nn.Module):
    """Odd sizes, so that partitions are padded; a scalar-like weight, a buffer; norms and biases in a second group."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.token = nn.Parameter(torch.randn(1, 1, 5))
        self.one = nn.Linear(5, 7)
        self.two = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.tensor(2.5))

    def forward(self, x):
        return self.two(self.one(x + self.token[0]).relu()) * self.scale


def adamw(model: Net) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2)


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank))


def in_one_process(world_size: int) -> dict[str, torch.Tensor]:
    model = Net()
    optimizer = adamw(model)
    for step in range(3):
        (model(torch.cat([batch(step, rank) for rank in range(world_size)])) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state |= {f"optim.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return state


def main(folder: Path, rank: int, world_size: int, *stages: int) -> None:
    ranks = {"rank": rank, "world_size": world_size, "timeout": timedelta(seconds=90)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", **ranks)
    for stage in stages:
        train(folder, rank, world_size, stage)
    dist.barrier()
    dist.destroy_process_group()


def train(folder: Path, rank: int, world_size: int, stage: int) -> None:
    model = Net()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adamw(model),
        config={
            "train_batch_size": 4 * world_size,
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 0.0,  # it clips to 1 otherwise
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
        dist_init_required=False,
    )
    for step in range(3):
        engine.backward((engine(batch(step, rank)) - 1).square().mean())
        engine.step()
    engine.save_checkpoint(str(folder / f"zero{stage}"), client_state={"epoch": 1})
    if rank == 0:
        save_file(in_one_process(world_size), folder / f"zero{stage}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
