"""`livt quickstart`: the shipped recipe on the shipped images, then the table."""

from __future__ import annotations

from pathlib import Path

from livt_scale.cli.options import Sets
from livt_scale.cli.output import echo, starting


def quickstart(sets: Sets = None) -> None:
    """Train both stages on the shipped images; print accuracy."""
    starting("quickstart", "checking the run")
    from livt_scale.config.load import load_recipe
    from livt_scale.evaluation.results import results_table
    from livt_scale.train.compare_run import check_start
    from livt_scale.train.run_files import EVAL, read_eval
    from livt_scale.util.resources import shipped

    recipe = load_recipe(shipped("recipes/fashion_mnist_lt/quickstart.yaml"), sets=sets or [])
    run_dir = Path(recipe.run_dir or "")
    if not check_start(recipe, run_dir):
        echo(f"This run is finished. To run it again, remove {run_dir}.")
    else:
        starting("quickstart")
        from livt_scale.study.report.at_end import write_at_end
        from livt_scale.train.run import train as run  # imports torch, which a finished run does not need

        run(recipe)
        write_at_end(run_dir)
    results_table(run_dir, read_eval(run_dir / "finetune" / EVAL))
