"""The picture in docs/losses.md shows the numbers that the losses use."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from livt_scale.losses import make_loss
from tests.scripts import load_script

SCRIPT = Path(__file__).parents[1] / "scripts" / "margins.py"


@pytest.fixture(scope="module")
def margins():
    return load_script(SCRIPT)


def test_the_lines_are_what_the_losses_use(margins):
    counts = [90, 9, 1]
    figure = Figure()
    margins.draw(figure, counts)
    lines = {line.get_label().split(":")[0]: line for axes in figure.axes for line in axes.lines}
    assert set(lines) == {"bal_ce", "bal_bce", "ldam", "cb_ce", "mislas"}
    for name, line in lines.items():
        assert line.get_xdata().tolist() == counts
        factor = -30 if name == "ldam" else 1
        assert line.get_ydata().tolist() == pytest.approx(
            [factor * n for n in make_loss(name, counts).by_class.tolist()]
        )


def test_it_is_of_the_set_that_ships_and_is_written(margins, tmp_path):
    assert (margins.SHIPPED[0], margins.SHIPPED[-1]) == (1000, 10)
    assert margins.main(["--out", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
