"""A planned stage as numbers, for `livt plan --json` and the screen."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from livt_scale.plan.assumptions import peak_tflops
from livt_scale.plan.limits import explain, little_work, parts_s
from livt_scale.plan.memory import GIB
from livt_scale.plan.stage_plan import StagePlan, plan_stage
from livt_scale.plan.step_time import decode_images_per_s

OPTIMIZER_TITLES = {"adamw": "AdamW", "lars": "LARS", "sgd": "SGD"}


def calibration(plan: StagePlan) -> dict[str, Any]:
    """What a calibration changed: the factor of the times, and high over low hours without and with it."""
    known = plan.task.calibration
    assert known is not None
    plain = plan_stage(replace(plan.task, calibration=None), plan.spread).range
    now = plan.range
    return {"from": known.source, "scale": known.scale, "width_before": plain[1] / plain[0], "width": now[1] / now[0]}


def energy_kwh(plan: StagePlan) -> float | None:
    """Of all nodes, cooling included; None where the device's power is not known."""
    power = plan.task.device.power_w
    return None if power is None else plan.hours * plan.task.gpus * power * plan.task.assumed.power_overhead / 1000


def figures(plan: StagePlan, *, price: float | None) -> dict[str, Any]:
    """One stage for `--json`."""
    task, hours, time = plan.task, plan.hours, plan.time
    low, high = plan.range
    images_per_s, device_hours = plan.images_per_s, hours * task.gpus
    peak = peak_tflops(task.device, plan.spread.precision)
    optimizer = task.recipe.stage(task.stage).trained_by.name
    return {
        "stage": task.stage,
        "nodes": task.nodes,
        "epochs": task.epochs,
        "params": sum(w.numel for w in task.weights),
        "trained_params": sum(w.numel for w in task.weights if w.trained),
        "train_flops_per_image": task.flops.train,
        "hardware_flops_per_image": task.flops.hardware if plan.spread.recompute else task.flops.train,
        "strategy": plan.spread.strategy,
        "micro_batch": plan.spread.micro_batch,
        "accumulation": plan.spread.accumulation,
        "activation_checkpointing": plan.spread.recompute,
        "memory_gib": plan.memory.gib(),
        "offload": plan.spread.offload,
        "offloaded_gib_per_node": plan.offloaded_node_bytes / GIB,
        "usable_gib": round(task.usable_bytes / GIB, 2),
        "fits": plan.fits,
        "why_not": plan.why_not or None,
        "steps": task.steps,
        "step_s": plan.step_s,
        "step_s_high": plan.step_s_high,
        "compute_s": time.compute_s,
        "parts_s": parts_s(plan),
        "host_s": time.host_s,
        "kernels": round(time.parts.launches),
        "exchange_s": time.exchange.exchange_s,
        "exposed_exchange_s": time.exposed_s,
        "exchanged_bytes_per_rank": time.exchange.traffic,
        "optimizer": OPTIMIZER_TITLES.get(optimizer, optimizer),
        "optimizer_s": time.optimizer_s,
        "offload_s": time.offload_s,
        "decode_s": time.input_s,
        "storage_s": time.storage_s,
        "limit": asdict(explain(plan)),
        "calibration": None if task.calibration is None else calibration(plan),
        "warning": little_work(plan) or None,
        "efficiency": time.efficiency,
        "mfu": images_per_s / task.gpus * task.flops.train / (peak * 1e12),
        "hours": hours,
        "hours_low": low,
        "hours_high": high,
        "device_hours": device_hours,
        "cost": None if price is None else device_hours * price,
        "energy_kwh": energy_kwh(plan),
        "images_per_s": images_per_s,
        "read_gb_s": images_per_s * task.data.image_bytes / 1e9,
        "read_tb": plan.epochs_read * task.data.images * task.data.image_bytes / 1e12,
        "storage_wait_hours": plan.storage_wait_hours,
        "decode_cores_per_node": images_per_s / decode_images_per_s(task, task.assumed) / task.nodes,
        "checkpoint": {name: getattr(plan.checkpoint, name) for name in plan.checkpoint.__dataclass_fields__},
    }
