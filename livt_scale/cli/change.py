"""The lines that `livt retrain`, `livt tau-norm` and `livt soup` print: accuracy before and after, and the export."""

from __future__ import annotations

from typing import Any

from livt_scale.cli.output import echo


def print_change(result: dict[str, Any]) -> None:
    images = f" on {result['held_out']['reported_on']} other images" if "held_out" in result else ""
    for name in ("before", "after"):
        if result[name] is not None:
            parts = (f"{group} {100 * value:.1f}" for group, value in result[name].items() if value is not None)
            echo(f"{name:<6}  top-1 in %{images}: {'  '.join(parts)}")
    echo(f"written: {result['out']}")
