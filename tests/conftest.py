"""What all tests share: a clean environment, one thread a process, golden files.

A golden file holds what a function gave when somebody last read it. `make golden` rewrites them; then read the diff.

    def test_the_batch_script(golden):
        golden("slurm/two_nodes.sbatch", render(…))
"""

import difflib
import gc
import os
import shutil
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch comes: two test processes share two cores

GOLDEN = Path(__file__).parent / "golden"
SLOW_FILES = (  # with most time first: `make test` gives files to its processes in this order
    "distributed/test_deepspeed.py",
    "distributed/test_strategies.py",
    "e2e/test_checkpoints.py",
    "e2e/test_run.py",
    "chaos/test_lost_ranks.py",
    "e2e/test_kill_and_resume.py",
    "data/remote/test_prefetch.py",
    "checkpoint/foreign/test_convert.py",
    "data/test_elastic.py",
    "study/report/test_html.py",
    "study/test_study.py",
    "test_your_data.py",
    "study/test_collect.py",
    "slurm/test_submit.py",
    "doctor/test_bench.py",
    "data/remote/test_cache.py",
    "benchmarks/test_loader_benchmark.py",
    "distributed/test_linear_probe.py",
    "config/test_load.py",
    "checkpoint/test_node_local.py",
    "checkpoint/test_faults.py",
    "data/test_loader.py",
    "slurm/test_script.py",
    "e2e/test_from_weights.py",
    "study/test_scaling_law.py",
    "chaos/test_anomalous_runs.py",
    "chaos/test_stops.py",
    "slurm/test_status.py",
    "test_extensions.py",
    "train/telemetry/test_layer_stats.py",
    "test_warm.py",
    "e2e/test_remote_data.py",
    "e2e/test_sampling_resume.py",
    "data/order/test_instance.py",
    "e2e/test_faults.py",
)
SLOW_S = 1800  # the bound of a slow test that has none of its own, on a machine that does other things too
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_", "LIVT_")

# The examples of a property are the same in each run, so that whether a test passes does not depend on luck.
# `make test-slow` draws others, by --hypothesis-profile=random.
hypothesis.settings.register_profile("livt", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.register_profile("random", deadline=None, max_examples=50)
hypothesis.settings.load_profile("livt")


def pytest_addoption(parser):
    parser.addoption("--rewrite-golden", action="store_true", help="write golden files instead of comparing with them")


def pytest_collection_modifyitems(config, items):
    """Slow files first, so that none runs alone at the end; with --rewrite-golden, only tests with golden files.

    Slow tests get SLOW_S in place of the bound of pyproject.toml.
    """
    place = {name: number for number, name in enumerate(SLOW_FILES)}
    folder = Path(__file__).parent
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_S))
    items.sort(key=lambda item: place.get(item.path.relative_to(folder).as_posix(), len(place)))
    if config.getoption("--rewrite-golden"):
        others = [item for item in items if "golden" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_collection_finish(session):
    """Garbage is collected without what all tests share: modules, and the tests themselves."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_launcher_in_the_environment(monkeypatch):
    """A test that runs inside a Slurm job or under torchrun is not a rank of it."""
    for name in [n for n in os.environ if n.startswith(LAUNCHER)]:
        monkeypatch.delenv(name)


@pytest.fixture
def golden(request):
    """`golden(name, text)`: the text equals tests/golden/NAME, or that file is rewritten."""

    def check(name: str, text: str) -> None:
        file = GOLDEN / name
        if request.config.getoption("--rewrite-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            return
        assert file.is_file(), f"there is no {file}: make golden writes it"
        expected = file.read_text(encoding="utf-8").splitlines()
        diff = "\n".join(difflib.unified_diff(expected, text.splitlines(), "golden", "now", lineterm=""))
        assert not diff, f"{file} differs; if that is meant, run make golden and read the diff:\n{diff}"

    return check


@pytest.fixture(scope="session")
def browser():
    """Debian's chromium without a window, by playwright."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium on the PATH (Debian: apt install chromium)")
    with sync.sync_playwright() as player:
        opened = player.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()
