"""Read what a run has trained: its model, its class names, and the likeliest classes of image files.

python examples/read_checkpoint.py runs/fashion-mnist-lt-quickstart photo.png other.jpg
"""

import argparse

import torch

import livt_scale as livt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", help="a run directory, or what `livt export` wrote")
parser.add_argument("images", nargs="*", help="image files")
parser.add_argument("--checkpoint", help="best, newest or a step; by default the final one")
options = parser.parse_args()

predictor = livt.load(options.run, checkpoint=options.checkpoint)
parameters = sum(p.numel() for p in predictor.model.parameters())
print(f"{type(predictor.model).__name__}, {parameters / 1e6:.2f} M parameters")
print(f"{len(predictor.class_names)} classes: {', '.join(predictor.class_names)}")

for path, top in zip(options.images, predictor(options.images).top(3), strict=True):
    print(f"{path}: " + ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in top))

# The model is a plain nn.Module: here are the features before its head.
if options.images:
    inputs = torch.stack([predictor.transform(path) for path in options.images]).to(predictor.device)
    with torch.no_grad():
        features = predictor.model.forward_head(predictor.model.forward_features(inputs), pre_logits=True)
    print(f"features {list(features.shape)}")
