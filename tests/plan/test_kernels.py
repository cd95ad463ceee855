"""Times from shapes: against a measured table, and properties of the roofline."""

from __future__ import annotations

from dataclasses import replace

import pytest

from livt_scale.plan.assumptions import accelerator
from livt_scale.plan.kernels import Parts, Software, elapsed_s, host_s, micro_batch, product_s
from livt_scale.plan.shapes import BlockStack, Network, Product

CHIP = accelerator("a100").chip("bf16", "likely")
EAGER = Software(fused_attention=False, adamw="foreach")
SIZES = {  # tokens, width, heads, depth, patch, px
    "ti": (197, 192, 3, 12, 16, 224), "s": (197, 384, 6, 12, 16, 224), "b": (197, 768, 12, 12, 16, 224),
    "l": (197, 1024, 16, 24, 16, 224), "h": (257, 1280, 16, 32, 14, 224), "b32": (50, 768, 12, 12, 32, 224),
    "b384": (577, 768, 12, 12, 16, 384), "l384": (577, 1024, 16, 24, 16, 384),
}  # fmt: skip


def vit(size):
    tokens, width, heads, depth, patch, px = SIZES[size]
    embed = Product(tokens - 1, 3 * patch**2, width, leads_back=False)
    return Network((BlockStack(tokens, width, heads, depth, tokens),), (embed, Product(1, width, 1000)), 3 * px**2)


@pytest.mark.parametrize(
    ("size", "batch", "images_per_s"),
    [
        ("ti", 512, 2293.5), ("s", 384, 1052.9), ("b", 192, 390.9), ("l", 64, 117.1), ("h", 16, 39.94),
        ("b32", 512, 1703.6), ("b384", 32, 96.96), ("l384", 12, 29.07),
    ],
)  # fmt: skip
def test_one_set_of_constants_meets_a_measured_table_from_vit_ti_to_h(size, batch, images_per_s):
    """timm, results/benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv: eager training under AMP on one RTX 3090."""
    chip = accelerator("rtx3090").chip("fp16", "likely")
    assert batch / elapsed_s(micro_batch(vit(size), batch, chip, EAGER), chip, EAGER) == pytest.approx(
        images_per_s, rel=0.15
    )


def test_no_product_beats_the_roofline():
    for m, n, k in ((8192, 8192, 8192), (50432, 768, 768), (1, 1000, 768), (64, 64, 16384), (200, 4096, 1024)):
        seconds = product_s(m, n, k, CHIP, low_bytes=2)
        assert seconds >= 2 * m * n * k / (CHIP.peak * 1e12 * CHIP.matmul)
        assert seconds >= 2 * (m * k + k * n + m * n) / CHIP.bandwidth
        assert seconds >= product_s(m, n, k, replace(CHIP, matmul=2 * CHIP.matmul), low_bytes=2)


def test_one_tile_more_than_a_wave_holds_costs_another_wave():
    full = product_s(128 * 108, 256, 4096, CHIP, low_bytes=2)  # 108 tiles of 128 x 256, or twice as many halves
    more = product_s(128 * 108 + 1, 256, 4096, CHIP, low_bytes=2)
    assert 1.2 * full < more < 2.1 * full


def test_a_narrow_decoder_reaches_less_than_a_wide_encoder():
    """Of the same FLOPs: 512 wide has a shorter inner dimension, more bytes and more kernels than 1024."""

    def share(width, tokens):
        network = Network((BlockStack(tokens, width, 16, 8, tokens),), (), 0)
        parts = micro_batch(network, 64, CHIP, Software())
        return (network.forward_flops + network.backward_flops) * 64 / elapsed_s(parts, CHIP, Software())

    assert share(512, 197) < 0.85 * share(1024, 197)


def test_small_batches_are_bound_by_the_host_and_compiling_helps():
    eager, compiled = Software(), Software(compiled=True)
    tiny = micro_batch(vit("b"), 1, CHIP, eager)
    assert elapsed_s(tiny, CHIP, eager) == host_s(sum(tiny, Parts()), CHIP, eager)
    assert elapsed_s(micro_batch(vit("b"), 1, CHIP, compiled), CHIP, compiled) < 0.6 * elapsed_s(tiny, CHIP, eager)
    large = [elapsed_s(micro_batch(vit("b"), 256, CHIP, how), CHIP, how) for how in (compiled, eager)]
    assert large[0] < large[1]


def test_recomputing_costs_a_forward_pass_less_its_last_products_and_saves_nothing():
    kept, again = (sum(micro_batch(vit("l"), 64, CHIP, Software(), recompute=r), Parts()) for r in (False, True))
    assert 1.2 * kept.busy_s < again.busy_s < 1.4 * kept.busy_s


def test_attention_written_out_costs_more_and_most_with_rows_that_are_not_aligned():
    fused, plain = (
        elapsed_s(micro_batch(vit("b384"), 16, CHIP, how), CHIP, how)
        for how in (Software(), Software(fused_attention=False))
    )
    assert plain > 1.3 * fused
    aligned = Network((BlockStack(576, 768, 12, 12, 576),), (), 0)
    odd = Network((BlockStack(577, 768, 12, 12, 577),), (), 0)
    seconds = [elapsed_s(micro_batch(one, 16, CHIP, EAGER), CHIP, EAGER) for one in (aligned, odd)]
    assert seconds[1] > 1.1 * seconds[0]


def test_a_frozen_backbone_goes_back_through_the_head_alone():
    forward, backward = micro_batch(vit("b"), 64, CHIP, Software(), frozen=True)
    assert backward.busy_s < 0.01 * forward.busy_s
