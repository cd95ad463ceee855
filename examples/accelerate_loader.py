"""The loader in a script with accelerate: on one process, or several.

python examples/accelerate_loader.py
torchrun --nproc-per-node 2 examples/accelerate_loader.py --cpu
"""

import argparse

import torch
from accelerate import Accelerator

import livt_scale as livt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--cpu", action="store_true")
options = parser.parse_args()

accelerator = Accelerator(cpu=options.cpu)  # before the loader is read: it asks torch.distributed for its rank
torch.manual_seed(0)
shards = livt.ShardSet.open("shards/fashion-mnist-lt/train-lt")
pixels = {"image_px": 28, "channels": 1, "mean": [0.286], "std": [0.353], "workers": 1, "device": accelerator.device}
loader = livt.TrainLoader(
    shards, global_batch=64, **pixels, crop_scale=(0.4, 1.0), rand_augment=None, random_erasing=0.0, cutmix=0.0
)
model = livt.build_classifier("vit_micro", num_classes=shards.num_classes, image_px=28, patch_px=7, channels=1)
groups = livt.optim.param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=0.75)
# The loader is not prepared: each process already gets its own share of every global batch.
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups))
loss = livt.losses.make("bal_bce", shards.class_counts)

for step, (images, targets) in enumerate(loader.epoch(0)):
    if step == options.steps:
        break
    value = loss(model(images), targets)
    accelerator.backward(value)
    optimizer.step()
    optimizer.zero_grad()

accelerator.print(f"{accelerator.num_processes} processes, {len(images)} images each, loss {value.item():.3f}")
val = livt.EvalLoader(livt.ShardSet.open("shards/fashion-mnist-lt/val"), **pixels)
top1 = livt.evaluate(model, val, shards)["top1"]  # all processes together; each image counts once
accelerator.print(f"top-1 {100 * top1['all']:.1f} %")
accelerator.end_training()
