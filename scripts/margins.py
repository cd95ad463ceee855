"""Draw docs/pictures/margins.png: what each loss makes of a class by how many images it has.

    python scripts/margins.py                     # the set that ships with the project: 1000 to 10 images
    python scripts/margins.py --counts 90 9 1 --out margins.png

Left, what is added to a class's logit in training: to every image's (bal_ce, bal_bce) or to that of its true class
alone (ldam, in units of the logits as the softmax sees them, so times s). Right, the weight of an image (cb_ce) and how
far its label is smoothed (mislas). The numbers are those of `make_loss`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from livt_scale.losses import make_loss
from livt_scale.losses.formulas import Loss
from livt_scale.util.plots import log_scale, png_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = [int(1000 * 100 ** (-c / 9)) for c in range(10)]  # shards/fashion-mnist-lt.yaml


def curves(counts: list[int]) -> dict[str, dict[str, list[float]]]:
    """Panel -> label -> one number a class."""

    def by_class(name: str) -> list[float]:
        loss = make_loss(name, counts)
        assert isinstance(loss, Loss)
        assert loss.by_class is not None
        return [float(number) for number in loss.by_class]

    return {
        "added to the logit": {
            "bal_ce: log π": by_class("bal_ce"),
            "bal_bce: log π − log(1 − π)": by_class("bal_bce"),
            "ldam: −s·m, true class alone": [-30 * m for m in by_class("ldam")],
        },
        "weight of an image, smoothing of its label": {
            "cb_ce: weight": by_class("cb_ce"),
            "mislas: smoothing": by_class("mislas"),
        },
    }


def draw(figure: Figure, counts: list[int]) -> None:
    for axes, (title, lines) in zip(figure.subplots(1, 2), curves(counts).items(), strict=True):
        for label, numbers in lines.items():
            axes.plot(counts, numbers, marker="o", label=label)
        axes.set(title=title, xlabel="training images of the class")
        log_scale(axes, "x")
        axes.legend()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw what each loss makes of a class by its images.")
    parser.add_argument("--counts", type=int, nargs="+", default=SHIPPED, help="images of each class")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures" / "margins.png")
    args = parser.parse_args(argv)
    with png_figure(args.out, width=8, height=3) as figure:
        draw(figure, args.counts)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
