"""What `livt_scale` offers: complete, documented, typed, and imported only when it is used."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import livt_scale as livt
from livt_scale.util.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
SUBMODULES = {"losses": ["make", "make_loss"], "optim": ["param_groups", "lr_at", "set_lr"]}
TAKEN = "a_name_that_is_taken"
BOTH_PLACES = rf"{Path(__file__).name}, line \d+: .* registered, by .*{Path(__file__).name}, line \d+"
PUBLIC = sorted(
    {*livt.__all__, *(f"{m}.{name}" for m, names in SUBMODULES.items() for name in names)} - set(SUBMODULES)
)


def value_of(name):
    value = livt
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_the_page_lists_every_public_name_and_nothing_else():
    assert sorted(re.findall(r"^### `livt\.([\w.]+)", PAGE, re.MULTILINE)) == PUBLIC


def test_the_three_lists_of_names_agree():
    tree = ast.parse((ROOT / "livt_scale" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))  # if TYPE_CHECKING
    typed = {
        (alias.asname, f"{node.module}.{alias.name}")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {(name, f"livt_scale.{home}.{name}") for name, home in livt._HOMES.items()}
    homes |= {(name, f"livt_scale.{name}") for name in livt._MODULES}
    assert typed == homes
    assert set(livt.__all__) == {name for name, _ in homes} | {"__version__"}
    assert dir(livt) == sorted(livt.__all__)


@pytest.mark.parametrize("name", [n for n in PUBLIC if n != "__version__"])
def test_each_has_a_docstring_that_names_what_it_raises_where_it_can_be_called(name):
    value = value_of(name)
    text = inspect.getdoc(value) or ""
    assert len(text) > 20
    if inspect.isfunction(value) and name not in ("optim.lr_at", "optim.set_lr"):  # arithmetic
        assert "Raises" in text


@pytest.mark.parametrize("name", ["TrainLoader", "EvalLoader", "build_classifier", "evaluate", "losses.make"])
def test_each_that_takes_or_gives_tensors_says_their_shapes_and_types(name):
    value = value_of(name)
    text = (inspect.getdoc(value) or "") + (inspect.getdoc(getattr(value, "epoch", None)) or "")
    assert re.search(r"float(32)? ?\[B, ", text)


def test_no_name_is_imported_before_it_is_used_and_none_of_them_needs_torch_to_be_there():
    code = (
        "import sys, livt_scale as livt\n"
        "light = [m for m in ('torch', 'numpy', 'pydantic', 'yaml') if m in sys.modules]\n"
        "livt.register_loss, livt.LossOptions, livt.ShardSet, livt.LivtError, livt.train\n"
        "print(light, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"


def test_train_stays_the_function_when_the_package_of_that_name_is_imported():
    import livt_scale.train.schedule
    from livt_scale.api.train import train

    assert livt_scale.train is livt.train is train
    assert sys.modules["livt_scale.train"] is not train


@pytest.mark.parametrize(
    ("register", "thing"),
    [
        (livt.register_loss, livt.LossOptions),
        (livt.register_sampler, livt.Sampler),
        (livt.register_optimizer, livt.OptimizerOptions),
        (livt.register_source_format, livt.SourceFormat),
    ],
)
def test_a_name_that_is_registered_twice_is_an_error_with_both_places(register, thing):
    assert register(TAKEN)(thing) is thing
    try:
        with pytest.raises(UsageError, match=BOTH_PLACES):
            register(TAKEN)(thing)
    finally:
        next(registry for registry in registries() if TAKEN in registry).remove(TAKEN)


def test_a_model_size_that_is_registered_twice_is_one_too():
    dims = livt.ViTDims(width=8, depth=1, heads=1, patch_px=4)
    assert livt.register_model_size(TAKEN, dims) is dims
    try:
        with pytest.raises(UsageError, match=BOTH_PLACES):
            livt.register_model_size(TAKEN, dims)
    finally:
        registries()[-1].remove(TAKEN)


def registries():
    from livt_scale.config.model import MODEL_SIZES
    from livt_scale.config.optimizers import OPTIMIZERS
    from livt_scale.config.sampling import SAMPLERS
    from livt_scale.data.build.formats import SOURCE_FORMATS
    from livt_scale.losses import LOSSES

    return LOSSES, SAMPLERS, OPTIMIZERS, SOURCE_FORMATS, MODEL_SIZES


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Trainloader'"):
        livt.Trainloader  # noqa: B018


def test_types_ship_with_the_package():
    assert (ROOT / "livt_scale" / "py.typed").is_file()
    assert '"livt_scale" = ["py.typed"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
