"""What share of its data sheet a device reaches, by family: the constants of the planner's times, with their sources.

    FAMILIES["volta"].matmul.likely   -> 0.60: a large product of full tiles reaches 60 % of the sheet's 125 TFLOP/s

Each constant is a `Guess`: the likely value, and the best and worst that a run may meet. None is fitted to a run that
the planner is compared with, unless docs/plan.md#published marks that run. A device file may give its own (measured)
values, `livt plan --device FILE.yaml`; what it leaves out is its family's, or of no known family, with a wider range.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

End = Literal["low", "likely", "high"]  # of the planned hours


class Guess(NamedTuple):
    """`best` and `worst`: for the hours."""

    worst: float
    likely: float
    best: float

    def at(self, end: End) -> float:
        return {"low": self.best, "likely": self.likely, "high": self.worst}[end]


MEMORY, GAP_US = Guess(0.70, 0.85, 0.92), Guess(3.0, 1.5, 1.0)  # round numbers, as the next ones
HOST_US, HOST_COMPILED_US = Guess(10.0, 7.0, 4.0), Guess(8.0, 5.0, 3.0)


@dataclass(frozen=True)
class Efficiency:
    """matmul: share of the peak that large products of full tiles reach. memory: share of the bandwidth.

    fused_attention: share of the peak in fused attention over full tiles, heads of 64. unaligned: speed of 16-bit
    products whose rows are no multiple of 8, against aligned ones. host_us, host_compiled_us: the host for one kernel,
    eager and compiled. gap_us: of the device between two kernels.
    """

    matmul: Guess
    fused_attention: Guess
    unaligned: Guess
    memory: Guess = MEMORY
    host_us: Guess = HOST_US
    host_compiled_us: Guess = HOST_COMPILED_US
    gap_us: Guess = GAP_US
    source: str = ""


Family = Literal["volta", "turing", "ampere", "ga10x", "ada", "hopper", "blackwell", "cdna2", "cdna3", "cpu", "unknown"]

# The largest products that anyone reached on a device ("maximum achievable matmul FLOPS", bf16; stas00/ml-engineering,
# compute/accelerator, read 2026-11): A100 271 of 312, H100 795 of 989.5, GH200 829, B200 1745 of 2250, MI300X 668 of
# 1307, MI325X 785. Likely: about 0.9 of that, the best shapes of many; worst: 0.7 of it (power, clocks).
FAMILIES: dict[Family, Efficiency] = {
    "volta": Efficiency(
        matmul=Guess(0.45, 0.60, 0.72),
        fused_attention=Guess(0.15, 0.22, 0.30),
        unaligned=Guess(0.15, 0.20, 0.30),
        memory=Guess(0.70, 0.80, 0.88),
        host_us=Guess(14.0, 10.0, 7.0),
        source="DeiT-B on one node (docs/plan.md#published); with it, the images/s of ViT-S to H in inference that "
        "README_revenge.md of facebookresearch/deit gives without naming the GPU are met within 11 %. Unaligned: "
        "tensor cores of this family take rows of multiples of 8 alone (NVIDIA, Tensor Core performance guide)",
    ),
    "turing": Efficiency(
        matmul=Guess(0.35, 0.50, 0.65),
        fused_attention=Guess(0.12, 0.20, 0.30),
        unaligned=Guess(0.15, 0.20, 0.30),
        source="no table of its own: Volta's tensor cores under a power limit of 70 W",
    ),
    "ampere": Efficiency(
        matmul=Guess(0.61, 0.80, 0.87),
        fused_attention=Guess(0.30, 0.45, 0.60),
        unaligned=Guess(0.20, 0.30, 0.50),
        source="271 of 312 TFLOP/s reached; fused attention 50 to 73 % of the peak over long sequences "
        "(FlashAttention-2, arXiv 2307.08691); eager inference of ViT-B and L (AITemplate, examples/04_vit) is met "
        "within 24 %",
    ),
    "ga10x": Efficiency(
        matmul=Guess(0.85, 1.05, 1.15),
        fused_attention=Guess(0.40, 0.60, 0.75),
        unaligned=Guess(0.60, 0.80, 1.00),
        memory=Guess(0.80, 0.90, 0.95),
        source="training of ViT-Ti to g on an RTX 3090, results/benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv of "
        "huggingface/pytorch-image-models; its clock is above the sheet's, hence more than 1",
    ),
    "ada": Efficiency(
        matmul=Guess(0.60, 0.80, 1.00),
        fused_attention=Guess(0.30, 0.45, 0.60),
        unaligned=Guess(0.50, 0.70, 1.00),
        source="no table of its own: between GA10x and Hopper; L40S and L4 are held back by their power",
    ),
    "hopper": Efficiency(
        matmul=Guess(0.50, 0.70, 0.80),
        fused_attention=Guess(0.20, 0.30, 0.40),
        unaligned=Guess(0.20, 0.30, 0.50),
        source="ViT-g/14 on one node (docs/plan.md#published); 795 (H100), 829 (GH200) of 989.5 TFLOP/s reached; "
        "FlashAttention-2 on an H100: 35 % of the peak over long sequences (arXiv 2407.08608)",
    ),
    "blackwell": Efficiency(
        matmul=Guess(0.45, 0.68, 0.78),
        fused_attention=Guess(0.12, 0.22, 0.35),
        unaligned=Guess(0.20, 0.30, 0.50),
        source="1745 of 2250 TFLOP/s reached; attention: Hopper's kernels, not its own",
    ),
    "cdna2": Efficiency(
        matmul=Guess(0.40, 0.60, 0.75),
        fused_attention=Guess(0.12, 0.20, 0.30),
        unaligned=Guess(0.30, 0.50, 0.70),
        source="no table of its own: between CDNA3 and Ampere",
    ),
    "cdna3": Efficiency(
        matmul=Guess(0.36, 0.48, 0.60),
        fused_attention=Guess(0.12, 0.20, 0.30),
        unaligned=Guess(0.30, 0.50, 0.70),
        source="668 (MI300X) and 785 (MI325X) of 1307 TFLOP/s reached",
    ),
    "cpu": Efficiency(
        matmul=Guess(0.50, 0.75, 0.95),
        fused_attention=Guess(0.15, 0.30, 0.50),
        unaligned=Guess(0.80, 1.00, 1.00),
        memory=Guess(0.40, 0.65, 0.90),
        host_us=Guess(12.0, 6.0, 3.0),
        gap_us=Guess(12.0, 6.0, 3.0),
        source="round numbers; measured ones of a machine: livt doctor --bench --device-file (docs/plan.md#accuracy)",
    ),
    "unknown": Efficiency(
        matmul=Guess(0.35, 0.65, 0.90),
        fused_attention=Guess(0.10, 0.25, 0.50),
        unaligned=Guess(0.15, 0.40, 1.00),
        memory=Guess(0.55, 0.80, 0.95),
        host_us=Guess(15.0, 7.0, 3.0),
        source="all families together",
    ),
}
EFFICIENCIES = tuple(f.name for f in fields(Efficiency) if f.name != "source")
MEASURED = 0.05  # relative uncertainty of a constant that a device file gives
MULTIPROCESSORS = 108  # of a device whose file does not say


def measured(value: float, *, more_is_better: bool) -> Guess:
    """A constant from a device file."""
    low, high = value * (1 - MEASURED), value * (1 + MEASURED)
    return Guess(low, value, high) if more_is_better else Guess(high, value, low)


@dataclass(frozen=True)
class Chip:
    """One device at one end of the range. peak: TFLOP/s of the precision; bandwidth: bytes/s that are reached."""

    peak: float
    bandwidth: float
    sms: int
    matmul: float
    fused_attention: float
    unaligned: float
    gap_us: float
    host_us: float
    host_compiled_us: float


def chip_at(end: End, efficiency: Efficiency, *, peak: float, memory_gb_s: float, multiprocessors: int) -> Chip:
    """`peak`: TFLOP/s, `memory_gb_s`: both of the data sheet."""
    return Chip(
        peak=peak,
        bandwidth=memory_gb_s * 1e9 * efficiency.memory.at(end),
        sms=multiprocessors,
        **{name: getattr(efficiency, name).at(end) for name in EFFICIENCIES if name != "memory"},
    )
