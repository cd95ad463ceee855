"""wandb and mlflow behind modules that record their calls: what is sent, that a run stays one run, what goes wrong."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import threading
import types
from pathlib import Path

import pytest

from livt_scale.config.load import load_recipe
from livt_scale.train.telemetry import trackers
from livt_scale.train.telemetry.trackers import InBackground, Trackers, check_installed, open_trackers
from livt_scale.util.errors import UsageError

QUICKSTART = Path(__file__).parents[3] / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"


def fake_module(name: str, **members) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for member, value in members.items():
        setattr(module, member, value)
    return module


class Wandb:
    def __init__(self) -> None:
        self.inits: list[dict] = []
        self.lines: list[tuple[int, dict]] = []
        self.configs: list[dict] = []
        self.finished = 0
        self.threads: set[str] = set()

    def init(self, **named):
        self.inits.append(named)
        return self

    def log(self, values, step=None):
        self.threads.add(threading.current_thread().name)
        self.lines.append((step, values))

    def update(self, values, allow_val_change=False):
        assert allow_val_change
        self.configs.append(values)

    def finish(self):
        self.finished += 1


class Mlflow:
    """As `Wandb`, a server with runs by number."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.params: dict[str, str] = {}
        self.lines: list[tuple[int, dict]] = []
        self.uri = None

    def start_run(self, *, run_id, run_name, **_named):
        self.runs.append(run_id or f"run-{len(self.runs)}")
        self.name = run_name
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=self.runs[-1]))

    def log_params(self, values):
        assert not self.params.keys() & values.keys(), "mlflow takes a parameter once"
        self.params |= values


@pytest.fixture
def wandb(monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake_module("wandb", init=fake.init, config=fake))
    return fake


@pytest.fixture
def mlflow(monkeypatch):
    fake = Mlflow()
    limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    module = fake_module(
        "mlflow",
        search_experiments=lambda filter_string: [],
        create_experiment=lambda **named: named["name"],
        start_run=fake.start_run,
        log_params=fake.log_params,
        log_metrics=lambda values, step: fake.lines.append((step, values)),
        set_tracking_uri=lambda uri: setattr(fake, "uri", uri),
        utils=types.SimpleNamespace(validation=limits),
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return fake


def opened(run_dir: Path, *names: str, start_step: int = 0, sent_to: int = 0, stage="pretrain", **sets) -> Trackers:
    sets = [f"log.trackers={json.dumps(names)}", "log.tensorboard=false", *(f"{k}={v}" for k, v in sets.items())]
    recipe = load_recipe(QUICKSTART, sets=sets)
    return open_trackers(recipe, stage, run_dir=run_dir, start_step=start_step, sent_to=sent_to)


def test_wandb_gets_the_resolved_recipe_and_the_numbers_of_each_line_from_a_thread_of_its_own(tmp_path, wandb):
    tracked = opened(tmp_path, "wandb")
    tracked.log({"loss": 0.5, "mfu": None, "layers": {"head": {"grad_norm": 2.0}}, "top": {}}, step=20)
    tracked.finish()
    assert wandb.lines == [(20, {"loss": 0.5, "layers/head/grad_norm": 2.0})]
    assert wandb.threads == {"livt-wandb"}
    assert wandb.configs[0]["stages"]["pretrain"]["mask_ratio"] == 0.75
    assert wandb.inits[0]["project"] == "livt"
    assert wandb.inits[0]["settings"]["disable_git"]
    assert wandb.finished == 1


def test_a_continued_stage_is_the_same_run_and_sends_no_line_twice(tmp_path, wandb):
    for start, sent_to in ((0, 0), (40, 60)):  # killed behind its checkpoint of step 40, when 60 had been sent
        tracked = opened(tmp_path, "wandb", start_step=start, sent_to=sent_to)
        for step in range(start + 20, 61 if not start else 101, 20):
            tracked.log({"loss": float(step)}, step=step)
        tracked.finish()
    assert wandb.inits[0]["id"] == wandb.inits[1]["id"]
    assert wandb.inits[1]["resume"] == "allow"
    assert [step for step, _ in wandb.lines] == [20, 40, 60, 80, 100]
    opened(tmp_path, "wandb", stage="finetune").finish()
    assert wandb.inits[2]["id"] != wandb.inits[0]["id"]
    assert set(json.loads((tmp_path / "trackers.json").read_text())["wandb"]) == {"pretrain", "finetune"}


def test_mlflow_goes_on_with_its_run_even_where_harmless_fields_have_changed(tmp_path, mlflow, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    opened(tmp_path, "mlflow").finish()
    tracked = opened(tmp_path, "mlflow", **{"data.workers": 7})
    tracked.log({"loss": 1.0}, step=20)
    tracked.finish()
    assert mlflow.runs == ["run-0", "run-0"]
    assert mlflow.params["stages.pretrain.mask_ratio"] == 0.75
    assert mlflow.lines == [(20, {"loss": 1.0})]
    assert mlflow.uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_server_of_the_environment_is_left_to_mlflow(tmp_path, mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@server")
    opened(tmp_path, "mlflow").finish()
    assert mlflow.uri is None
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"secret" not in written


def test_a_tracker_that_is_not_installed_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    recipe = load_recipe(QUICKSTART, sets=["log.trackers=[mlflow]"])
    with pytest.raises(UsageError, match="pip install mlflow"):
        check_installed(recipe.log)


def test_a_tracker_that_does_not_start_is_an_error_before_training(tmp_path, wandb, monkeypatch):
    def refuse(**_named):
        raise ValueError("api_key not configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UsageError, match=r"wandb does not start: ValueError: api_key.*WANDB_MODE=offline"):
        opened(tmp_path, "wandb")


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(trackers, "START_S", 0.05)
    released = threading.Event()
    with pytest.raises(UsageError, match="no answer within"):
        InBackground("wandb", lambda: released.wait(5))
    released.set()


class Slow:
    def __init__(self) -> None:
        self.release = threading.Event()
        self.lines = 0

    def log(self, values, step=None):
        self.release.wait(5)
        self.lines += 1

    def finish(self):
        pass


def test_a_slow_server_stops_nobody_and_what_it_cannot_take_is_dropped_and_logged(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "MAX_WAITING", 5)
    slow = Slow()
    tracker = InBackground("mlflow", lambda: (slow, "id"))
    for step in range(20):
        tracker.log({"loss": 1.0}, step=step)
    (warning,) = caplog.messages
    assert "dropped" in warning
    slow.release.set()
    tracker.finish()
    assert 5 <= slow.lines <= 7


def test_an_end_that_the_server_does_not_take_is_bounded(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "FINISH_S", 0.05)
    slow = Slow()
    tracker = InBackground("mlflow", lambda: (slow, "id"))
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish()
    assert "has not taken all lines" in caplog.text
    slow.release.set()


def test_a_line_that_is_refused_costs_the_line(tmp_path, wandb, caplog):
    taken = []

    def log(values, step=None):
        if step == 1:
            raise ConnectionError("gone")
        taken.append(step)

    wandb.log = log
    tracked = opened(tmp_path, "wandb")
    for step in (1, 2, 3):
        tracked.log({"loss": 1.0}, step=step)
    tracked.finish()
    assert taken == [2, 3]
    assert caplog.messages == ["wandb: ConnectionError: gone; the line of step 1 is missing there (logged once)"]


def test_names_of_runs_that_cannot_be_read_are_told(tmp_path, wandb):
    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        opened(tmp_path, "wandb")
