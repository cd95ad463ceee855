"""Your own training loop: shards to accuracy by group, without a recipe; the weights are those of `livt train`.

python examples/own_loop.py                  # as the quickstart fine-tunes, from scratch
python examples/own_loop.py --epochs 5
"""

import argparse

import torch

import livt_scale as livt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--train", default="shards/fashion-mnist-lt/train-lt")
parser.add_argument("--val", default="shards/fashion-mnist-lt/val")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--steps", type=int, help="stop each epoch after this many steps, to try it out")
options = parser.parse_args()
torch.manual_seed(0)

shards = livt.ShardSet.open(options.train)
pixels = {"image_px": 28, "channels": 1, "mean": [0.286], "std": [0.353], "workers": 1}
model = livt.build_classifier(
    "vit_micro", num_classes=shards.num_classes, image_px=28, patch_px=7, channels=1, drop_path=0.1
)
loader = livt.TrainLoader(
    shards, global_batch=64, **pixels, crop_scale=(0.4, 1.0), rand_augment=None, random_erasing=0.0,
    mixup=0.8, cutmix=0.0, smoothing=0.1, seed=0, num_branches=model.num_branches,
)  # fmt: skip
loss = livt.losses.make("bal_bce", shards.class_counts)
groups = livt.optim.param_groups(model, lr=options.lr, weight_decay=0.05, layer_decay=0.75)
optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
schedule = {
    "steps_per_epoch": loader.steps_per_epoch, "epochs": options.epochs, "warmup_epochs": options.epochs / 10,
    "peak_lr": options.lr, "min_lr": 1e-6,
}  # fmt: skip

for epoch in range(options.epochs):
    total, steps = 0.0, options.steps or loader.steps_per_epoch
    for step, (images, targets, drop) in zip(range(steps), loader.epoch(epoch)):  # noqa: B905
        livt.optim.set_lr(optimizer, livt.optim.lr_at(epoch * loader.steps_per_epoch + step, **schedule))
        value = loss(model(images, drop), targets)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += value.item()
    print(f"epoch {epoch}: loss {total / steps:.3f}")

val = livt.EvalLoader(livt.ShardSet.open(options.val), **pixels)
top1 = livt.evaluate(model, val, shards)["top1"]
print("top-1 " + ", ".join(f"{group} {100 * top1[group]:.1f} %" for group in ("all", "many", "medium", "few")))
