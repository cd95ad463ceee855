"""A custom loss, registered: it has a name in the API and in recipes.

python examples/custom_loss.py
LIVT_EXTENSIONS=$PWD/examples/custom_loss.py livt train recipe.yaml --set stages.finetune.loss.name=sqrt_weighted
"""

import numpy as np
import torch
from pydantic import Field

import livt_scale as livt


@livt.register_loss("sqrt_weighted")
class SqrtWeighted(livt.LossOptions):
    """Cross entropy whose classes weigh by a negative power of their number of images, with mean 1."""

    name: str = "sqrt_weighted"
    power: float = Field(0.5, ge=0, le=1, description="0: as cross entropy; 1: inverse frequency")

    def build(self, counts: np.ndarray):
        weights = torch.from_numpy(counts**-self.power * len(counts) / (counts**-self.power).sum())

        def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # [B, C] both
            weighted = targets * weights.to(logits.device, logits.dtype)
            return -(weighted * logits.log_softmax(dim=1)).sum(dim=1).mean()

        return loss


if __name__ == "__main__":
    counts = livt.ShardSet.open("shards/fashion-mnist-lt/train-lt").class_counts
    logits, labels = torch.zeros(2, 10), torch.tensor([0, 9])  # the largest and the smallest class
    for power in (0.0, 0.5, 1.0):
        loss = livt.losses.make("sqrt_weighted", counts, power=power)
        of_largest, of_smallest = (loss(logits[k : k + 1], labels[k : k + 1]) for k in (0, 1))
        print(f"power {power}: largest class {of_largest:.3f}, smallest {of_smallest:.3f}")
    try:
        livt.losses.make("sqrt_weighted", counts, power=2)
    except livt.UsageError as error:
        print(error)
