"""The balanced loss alone: a model of timm, timm's Mixup, and data that come from anywhere.

python examples/timm_loss.py
"""

import argparse

import timm
import torch
from timm.data import Mixup

import livt_scale as livt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()
torch.manual_seed(0)

class_counts = [90, 9, 1]  # images of each class in the training set
labels = torch.repeat_interleave(torch.arange(3), torch.tensor(class_counts))
images = torch.randn(100, 3, 32, 32) + labels[:, None, None, None]
batches = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(images, labels), batch_size=20, shuffle=True, drop_last=True
)

model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3)
mix = Mixup(mixup_alpha=0.8, cutmix_alpha=0.0, label_smoothing=0.1, num_classes=3)
loss = livt.losses.make("bal_bce", class_counts)
groups = livt.optim.param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=0.75)
optimizer = torch.optim.AdamW(groups)

done = 0
while done < options.steps:
    for batch, numbers in batches:
        mixed, targets = mix(batch, numbers)  # soft targets [B, C]; plain labels [B] do as well
        value = loss(model(mixed), targets)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
print(f"loss {value.item():.3f} after {done} steps")

with torch.no_grad():
    right = model.eval()(images).argmax(1) == labels
print("accuracy by class: " + ", ".join(f"{right[labels == c].float().mean():.2f}" for c in range(3)))
