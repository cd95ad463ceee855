"""Bal-BCE forward and backward, ours, against binary cross entropy without any margin and against the published form.

    python benchmarks/loss.py --json loss.json          # 1024 images, 8142 classes; a minute
    python benchmarks/loss.py --quick                   # small and short: does it run?

plain: `F.binary_cross_entropy_with_logits`, summed, over the batch: what no margin would cost. published: LiVT's public
form written out (arXiv 2212.02015): the log-odds of the shares reckoned at each call, added to the logits, and C times
the mean over all terms. All take the same logits and mixed, smoothed targets. They run in turn, so that a busy machine
slows all; the figure is the median. Peak memory is what torch's allocator has given out beside logits and targets, the
gradient included. Ours and the published one must agree, value and gradient, or it fails: where a class is
rightly unlikely, torch's formula subtracts two nearly equal numbers, so the published value is itself 2e-5 off.
One thread, unless --threads says otherwise: on a shared machine more of them measure how long they wait for each other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # beside this script, however it was started
from step import _processor as processor

from livt_scale.losses import make_loss
from livt_scale.losses.formulas import soft_targets

WARM_UP = 3  # rounds that are not timed
TOLERANCE = 1e-4  # of ours and the published form, relative
Criterion = Callable[[Tensor, Tensor], Tensor]


def class_counts(num_classes: int, *, largest: int = 1000, smallest: int = 2) -> list[int]:
    """Falling as a power from the largest class of iNaturalist 2018 to its smallest."""
    return [max(smallest, round(largest * (smallest / largest) ** (c / num_classes))) for c in range(num_classes)]


def contenders(num_classes: int) -> dict[str, Criterion]:
    counts = class_counts(num_classes)
    shares = torch.tensor(counts, dtype=torch.float32)
    shares /= shares.sum()

    def plain(logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)

    def published(logits: Tensor, targets: Tensor) -> Tensor:
        pi = shares.to(logits.device)
        logits = logits + 1.0 * (torch.log(pi) - torch.log(1 - pi))
        return num_classes * F.binary_cross_entropy_with_logits(logits, targets)

    return {"ours": make_loss("bal_bce", counts), "plain": plain, "published": published}


def draw(batch: int, num_classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits `[B, C]`, a leaf, and targets as smoothing and mixup leave them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, num_classes, generator=generator).to(device).requires_grad_()
    labels = torch.randint(num_classes, (batch,), generator=generator).to(device)
    targets = soft_targets(labels, num_classes, 0.1)
    return logits, targets.mul_(0.3).add_(soft_targets(labels.roll(1), num_classes, 0.1), alpha=0.7)


def once(criterion: Criterion, logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """(loss, seconds) of a forward and backward pass; the gradient is left in `logits.grad`."""
    logits.grad = None
    _wait(logits.device)
    start = time.perf_counter()
    loss = criterion(logits, targets)
    loss.backward()
    _wait(logits.device)
    return loss.item(), time.perf_counter() - start


def measure_time(losses: dict[str, Criterion], logits: Tensor, targets: Tensor, *, rounds: int) -> dict[str, Any]:
    """Seconds of each, medians of rounds in turn; ours over plain by round; how far ours and published are apart."""
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    found: dict[str, tuple[float, Tensor]] = {}
    for number in range(WARM_UP + rounds):
        for name in list(losses) if number % 2 else list(losses)[::-1]:  # who goes first changes
            loss, taken = once(losses[name], logits, targets)
            if number == 0:
                assert logits.grad is not None
                found[name] = loss, logits.grad.clone()
            if number >= WARM_UP:
                seconds[name].append(taken)
    exact = losses["ours"](logits.detach().double(), targets.double()).item()
    by_round = [ours / plain for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True)]
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        "seconds": medians,
        "time_ratio": statistics.median(by_round),
        "time_ratio_middle_half": _middle_half(by_round),
        "time_ratio_to_published": medians["ours"] / medians["published"],
        "largest_relative_difference": _apart(found["ours"], found["published"]),
        "value_off_float64": {name: abs(found[name][0] / exact - 1) for name in ("ours", "published")},
    }


def _apart(ours: tuple[float, Tensor], other: tuple[float, Tensor]) -> float:
    gradient = (ours[1] - other[1]).abs().max() / other[1].abs().max()
    return max(abs(ours[0] / other[0] - 1), gradient.item())


def _middle_half(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def measure_memory(losses: dict[str, Criterion], logits: Tensor, targets: Tensor) -> dict[str, Any]:
    """Bytes that each holds at its peak beside logits and targets, gradient included."""
    peaks = {name: _peak_bytes(criterion, logits, targets) for name, criterion in losses.items()}
    return {
        "peak_bytes": peaks,
        "memory_ratio": peaks["ours"] / peaks["plain"],
        "memory_ratio_to_published": peaks["ours"] / peaks["published"],
        "bytes_of_the_logits": logits.nbytes,
    }


def _peak_bytes(criterion: Criterion, logits: Tensor, targets: Tensor) -> int:
    """The highest sum of what torch's allocator gave and took back: the same in every run, unlike resident memory."""
    logits.grad = None
    if logits.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once(criterion, logits, targets)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        once(criterion, logits, targets)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]  # freed: negative
    return max(itertools.accumulate(changes))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(found: dict[str, Any]) -> str:
    low, high = found["time_ratio_middle_half"]
    mib = 2**20
    lines = [
        f"Forward and backward, {found['batch']} images, {found['classes']} classes, {found['threads']} threads,",
        f"{found['device']}, torch {found['torch']}; median of {found['rounds']} rounds in turn",
        "",
        f"{'':22}{'ms':>8}{'peak MiB':>10}",
        *(
            f"{label:22}{found['seconds'][name] * 1e3:8.1f}{found['peak_bytes'][name] / mib:10.0f}"
            for name, label in (("ours", "Bal-BCE, ours"), ("plain", "BCE, plain"), ("published", "Bal-BCE, published"))
        ),
        "",
        f"ours takes {found['time_ratio']:.2f} of plain's time (middle half of rounds {low:.2f} to {high:.2f}) and "
        f"{found['memory_ratio']:.2f} of its memory,",
        f"{found['time_ratio_to_published']:.2f} and {found['memory_ratio_to_published']:.2f} of the published form's; "
        f"the logits are {found['bytes_of_the_logits'] / mib:.0f} MiB",
        f"ours and published differ by at most {found['largest_relative_difference']:.1e}",
        f"their values lie {found['value_off_float64']['ours']:.1e} and {found['value_off_float64']['published']:.1e} "
        "from that in float64",
    ]
    return "\n".join(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Bal-BCE: ours against plain BCE and the published form.")
    parser.add_argument("--quick", action="store_true", help="small and short: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--batch", type=int, help="images; default 1024, quick 64")
    parser.add_argument("--classes", type=int, help="default 8142, quick 1000")
    parser.add_argument("--rounds", type=int, help="timed rounds; default 41, quick 3")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default 1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    for name, usual, quick in (("batch", 1024, 64), ("classes", 8142, 1000), ("rounds", 41, 3)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else usual)
    if args.batch < 1 or args.classes < 2 or min(args.rounds, args.threads) < 1:
        parser.error("--batch, --rounds and --threads must be at least 1, --classes at least 2")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    losses = contenders(args.classes)
    logits, targets = draw(args.batch, args.classes, device)
    found = measure_time(losses, logits, targets, rounds=args.rounds) | measure_memory(losses, logits, targets)
    found |= {"batch": args.batch, "classes": args.classes, "rounds": args.rounds, "quick": args.quick}
    found |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else processor()}
    found |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    if not found["largest_relative_difference"] <= TOLERANCE:
        print("ours and the published form do not agree: this compares two computations", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
