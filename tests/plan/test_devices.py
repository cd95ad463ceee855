"""Peaks by what torch calls a device; none where nobody knows."""

from __future__ import annotations

import pytest

from livt_scale.plan.devices import _NAMES, DEVICES, named


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("Tesla V100-PCIE-16GB", "v100-pcie"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI250X", "mi250x"),
    ],
)
def test_a_device_is_known_by_its_name(name, key):
    assert named(name) is DEVICES[key]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA GH200 144G HBM3e",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H20",
        "Quadro P400",
        "",
    ],
)
def test_an_unknown_device_has_no_made_up_peak(name):
    assert named(name) is None


def test_every_device_can_be_named():
    assert {key for _, key in _NAMES} == set(DEVICES)


def test_a_peak_is_that_of_the_arithmetic():
    a100, v100 = DEVICES["a100"], DEVICES["v100"]
    assert a100.peak_tflops("bf16") == 312
    assert a100.peak_tflops("fp32") == 19.5
    assert a100.peak_tflops("fp32", tf32=True) == 156
    assert v100.peak_tflops("bf16") is None  # emulated there, if at all
    assert v100.peak_tflops("fp32", tf32=True) == 15.7


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_lower_precision_is_never_slower_and_sparsity_is_nowhere_counted(device):
    assert device.fp16 >= (device.tf32 or 0) >= (device.fp32 if device.tf32 else 0)
    assert device.bf16 in (None, device.fp16)
