"""The results of benchmarks/gpu.sh as Markdown.

    python benchmarks/gpu_table.py gpu.jsonl                        # printed
    python benchmarks/gpu_table.py gpu.jsonl --page docs/gpu.md     # in place of what is between the page's two markers

Results of a CPU are refused in the page. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="gpu.jsonl")
    parser.add_argument("--page", type=Path, help="put the tables between the markers of this page")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.results.read_text().splitlines()]
    text = tables(lines)
    if args.page is None:
        print(text)
        return
    if machine_of(lines).get("device_type") != "cuda":
        sys.exit(f"{args.results}: these results are not of a GPU")
    args.page.write_text(filled(args.page.read_text(), text, page=args.page))


def filled(page_text: str, tables_text: str, *, page: Path) -> str:
    """The page with `tables_text` between its markers."""
    before, begin, rest = page_text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{page} has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables_text}\n\n{END}{after}"


def tables(lines: list[Line]) -> str:
    """A sentence about the machine, and a table for each part that has results."""
    machine = machine_of(lines)
    ceiling = next((x["tflops"] for x in lines if x["part"] == "ceilings" and "tflops" in x), None)
    versions = ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items() if v)
    where = f"{machine.get('device', 'a CPU')}, driver {machine.get('driver')}, CUDA {machine.get('cuda')}"
    found = [
        f"{machine.get('date')}, commit {machine.get('commit')}: {where}, {machine.get('cores')} cores, {versions}."
    ]
    found += [_ceilings(lines)]
    found += [_right(lines), _waits(lines), _steps(lines, peak=machine.get("peak_tflops"), ceiling=ceiling)]
    found += [_train(lines), _failed(lines)]
    return "\n\n".join(text for text in found if text)


def machine_of(lines: list[Line]) -> Line:
    return next((line for line in lines if line["name"] == "machine"), {})


def _of(lines: list[Line], *parts: str) -> list[Line]:
    return [line for line in lines if line["part"] in parts and "failed" not in line]


def _table(head: str, rows: list[Line], cells: Callable[[Line], list[Any]]) -> str:
    if not rows:
        return ""
    columns = head.split(" | ")
    body = [" | ".join("" if cell is None else str(cell) for cell in cells(row)) for row in rows]
    return "\n".join(f"| {row} |" for row in (head, " | ".join(["---"] * len(columns)), *body))


def _ceilings(lines: list[Line]) -> str:
    rows = [line for line in _of(lines, "ceilings") if line["name"] != "machine"]

    def cells(row: Line) -> list[Any]:
        if row["name"] == "product":
            return [f"product of {row['side']}×{row['side']}, bf16", f"{row['tflops']} TFLOP/s"]
        return [f"copy of {row['bytes'] / 1e9:g} GB on the device", f"{row['gb_per_s']} GB/s read and written"]

    return _table("ceiling | measured", rows, cells)


def _right(lines: list[Line]) -> str:
    def cells(row: Line) -> list[Any]:
        verdict = "yes" if row["agrees"] else "**no**"
        return [row["name"], row["compared"], f"{row['largest']:.1e}", f"{row['allowed']:.0e}", verdict]

    head = "`livt train`, GPU against CPU | losses | largest difference | allowed | agrees"
    return _table(head, _of(lines, "right"), cells)


def _waits(lines: list[Line]) -> str:
    def cells(row: Line) -> list[Any]:
        where = ", ".join(f"`{place}` {count}" for place, count in row["ordinary"].items())
        return [row["name"], row["ordinary_steps"], row["in_ordinary_steps"], where or "nowhere"]

    return _table("waits of the host | ordinary steps | waits in them | where", _of(lines, "waits"), cells)


def _steps(lines: list[Line], *, peak: float | None, ceiling: float | None) -> str:
    def cells(row: Line) -> list[Any]:
        peak_bytes = row.get("peak_bytes")
        memory = row.get("peak_gib") or (round(peak_bytes / 2**30, 1) if peak_bytes else None)
        shares = [f"{row['tflops'] / top:.1%}" if top else None for top in (peak, ceiling)]
        name = f"ViT-L {row['name']}" if row["part"] == "zero" else row["name"]
        return [name, row["batch"], f"{row['step_s']:.4f}", row["images_per_s"], *shares, memory]

    head = "step of pretraining | images | s | images/s | MFU | of the measured product | peak GiB"
    return _table(head, _of(lines, "mfu", "zero"), cells)


def _train(lines: list[Line]) -> str:
    def cells(row: Line) -> list[Any]:
        share = None if row["mfu"] is None else f"{row['mfu']:.1%}"
        times = [row["step_s"], row["data_wait_s"], row["checkpoint_stall_s"]]
        return [row["steps"], row["batch"], row["images_per_s"], share, *times]

    head = "`livt train`, steps | images | images/s | MFU | s a step | waiting for data | held up by checkpoints"
    return _table(head, _of(lines, "train"), cells)


def _failed(lines: list[Line]) -> str:
    return _table(
        "failed | why", [x for x in lines if "failed" in x], lambda x: [f"{x['part']}: {x['name']}", f"`{x['failed']}`"]
    )


if __name__ == "__main__":
    main()
