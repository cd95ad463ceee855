"""What the whole tree promises: files stay short, and the documents tell of commands that exist."""

import ast
import contextlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

import livt_scale
from livt_scale.cli import main
from livt_scale.config.fields import all_fields

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for folder in ("livt_scale", "scripts", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")])
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
# Longer ones, each with its reason ("path" or "path:function"). The list may only shrink.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


def name_of(path):
    return str(path.relative_to(ROOT))


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


# --- the code ---


def test_files_are_short():
    lengths = {name_of(p): len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCES}
    assert {p: n for p, n in lengths.items() if n > MAX_FILE_LINES and p not in LONG_FILES} == {}
    assert [p for p in LONG_FILES if lengths.get(p, 0) <= MAX_FILE_LINES] == []  # no longer an exception: take it out


def test_functions_are_short():
    lengths = {
        f"{name_of(path)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {f: n for f, n in lengths.items() if n > MAX_FUNCTION_LINES and f not in LONG_FUNCTIONS} == {}
    assert [f for f in LONG_FUNCTIONS if lengths.get(f, 0) <= MAX_FUNCTION_LINES] == []


def test_no_test_replaces_a_private():
    """A fake belongs at the process boundary or at a public seam, so that the inside can change."""
    found = {name_of(p): replaced_privates(p.read_text(encoding="utf-8")) for p in sorted(ROOT.glob("tests/**/*.py"))}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        "monkeypatch.setattr(module, '_name', 1)",
        "monkeypatch.setattr('livt_scale.module._name', 1)",
        "patch.setitem(module._table, 'key', 1)",
        "mock.patch('livt_scale.module._name')",
        "mock.patch.object(module, '_name')",
        "module._name = lambda: 1",
        "module.Class._name += 1",
        "RANK = 'import module\\nmodule._name = 1'",
    ],
)
def test_a_replaced_private_would_be_found(code):
    assert replaced_privates(code) == ["_name" if "_table" not in code else "_table"]
    assert replaced_privates(code.replace("_name", "name").replace("_table", "table")) == []


def replaced_privates(code):
    """The privates that a test's code sets; code in its strings counts, what an object sets on itself does not."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [t.attr for t in targets if isinstance(t, ast.Attribute) and not is_name(t.value, "self")]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if name in ("setattr", "delattr", "setitem", "delitem", "patch", "object"):
                words = [a.value.rpartition(".")[2] for a in node.args[:2] if is_text(a)]
                found += words + [a.attr for a in node.args[:1] if isinstance(a, ast.Attribute)]
        elif is_text(node) and "\n" in node.value:
            with contextlib.suppress(SyntaxError, UnicodeEncodeError):
                found += replaced_privates(node.value)
    return [name for name in found if re.match("_(?!_)", name)]


def is_name(node, name):
    return isinstance(node, ast.Name) and node.id == name


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_says_what_it_is_for(path):
    said = ast.get_docstring(parsed(path))
    if path.name == "__init__.py" and not path.read_text(encoding="utf-8").strip():
        return  # a folder without a word of its own
    assert said, f"{name_of(path)} has no docstring"


def test_every_environment_variable_that_is_read_is_documented():
    pattern = re.compile(r"(?:environ(?:\.(?:get|setdefault|pop)\(|\[)|getenv\()\s*[\"']([A-Z][A-Z0-9_]+)")
    read = {name for path in SOURCES for name in pattern.findall(path.read_text(encoding="utf-8"))}
    documented = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", (ROOT / "docs/environment.md").read_text()))
    assert read - documented == set()


def test_the_changelog_and_the_package_agree_on_the_version():
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert newest[1] == citation["version"] == livt_scale.__version__


# Reading a file by name elsewhere than in util/outside.py: each module with its reason. The list may only shrink.
RAW_READS = {
    "livt_scale/checkpoint/foreign/archive.py": "a zip archive, from a file that is open",
    "livt_scale/checkpoint/foreign/pickles.py": "torch maps the file that is held open and was checked",
    "livt_scale/checkpoint/node_local.py": "/proc",
    "livt_scale/checkpoint/tensor_file.py": "what this process has just written; a file that is held open",
    "livt_scale/cli/main.py": "/dev/null",
    "livt_scale/config/catalog.py": "recipes that ship with the package",
    "livt_scale/data/build/idx.py": "gzip, from bytes",
    "livt_scale/data/build/record.py": "gzip, from a file that is open",
    "livt_scale/data/build/stored.py": "Pillow, from bytes",
    "livt_scale/data/image/decode.py": "Pillow, from bytes",
    "livt_scale/data/remote/cache.py": "the cache's own files, opened without following links",
    "livt_scale/data/shard_set.py": "numpy maps the file that is held open",
    "livt_scale/distributed/cpu_cores.py": "/proc",
    "livt_scale/doctor/checks.py": "/sys",
    "livt_scale/doctor/disk.py": "what this process has just written",
    "livt_scale/slurm/code_snapshot.py": "the package's own code",
    "livt_scale/slurm/processes.py": "/proc",
    "livt_scale/slurm/progress.py": "YAML, from text",
    "livt_scale/slurm/submit.py": "the batch script that ships with the package",
    "livt_scale/study/report/html.py": "the page that ships with the package",
    "livt_scale/study/report/interactive.py": "bokeh's own script",
    "livt_scale/study/report/thumbnails.py": "Pillow, from a file that is open",
    "livt_scale/train/guard.py": "/proc; it imports nothing of the package",
    "livt_scale/train/heartbeat.py": "/proc",
    "livt_scale/train/telemetry/profiler.py": "what this process has just written",
    "livt_scale/util/atomic.py": "folders, new files and locks, which are checked",
    "livt_scale/util/held_file.py": "a new file; /proc",
    "livt_scale/util/outside.py": "the one reader",
}
READERS = {
    "json.load",
    "np.load",
    "np.memmap",
    "np.fromfile",
    "np.loadtxt",
    "np.genfromtxt",
    "np.lib.format.open_memmap",
}
READERS |= {"yaml.load", "yaml.safe_load", "torch.load", "load_file", "safe_open", "pickle.load", "os.open", "io.open"}
READERS |= {"gzip.open", "tarfile.open", "zipfile.ZipFile", "Image.open", "shutil.copyfile"}


def reads_a_file(call):
    """Whether this call opens a file by its name for reading."""
    name = ast.unparse(call.func)
    if name in READERS or name.endswith((".read_text", ".read_bytes")):
        return True
    if name.rpartition(".")[2] != "open":
        return False
    places = call.args[1:] if name == "open" else call.args
    mode = next((word.value for word in call.keywords if word.arg == "mode"), places[0] if places else None)
    if mode is None:
        return True
    return isinstance(mode, ast.Constant) and isinstance(mode.value, str) and not set(mode.value) & set("wxa")


def package_files_with(is_meant):
    """Names of the package's files whose syntax tree has a node of which `is_meant` is true."""
    return {
        name_of(path)
        for path in SOURCES
        if path.is_relative_to(ROOT / "livt_scale")
        for node in ast.walk(parsed(path))
        if is_meant(node)
    }


def test_files_from_outside_are_opened_by_one_function():
    found = package_files_with(lambda node: isinstance(node, ast.Call) and reads_a_file(node))
    assert found - RAW_READS.keys() == set()  # util/outside.py: open_checked, read_checked, read_text, read_json
    assert RAW_READS.keys() - found == set()  # no longer an exception: take it out


@pytest.mark.parametrize(
    "code", ["open(p)", "p.open()", "p.open('rb')", "open(p, mode='r')", "p.read_text()", "np.load(p)"]
)
def test_a_raw_read_would_be_found(code):
    assert reads_a_file(ast.parse(code).body[0].value)


@pytest.mark.parametrize("code", ["open(p, 'w')", "p.open('ab')", "ShardSet.open(folder)", "read_text(p, 'recipe')"])
def test_writing_and_other_calls_named_open_are_not_taken_for_it(code):
    assert not reads_a_file(ast.parse(code).body[0].value)


PRINTERS = {"cli/output.py": "the one printer", "cli/status.py": "clears the screen", "cli/main.py": "errors, escaped"}


def test_commands_print_by_one_function_that_escapes_names():
    printing = {
        path.relative_to(ROOT / "livt_scale").as_posix()
        for path in (ROOT / "livt_scale/cli").glob("*.py")
        if re.search(r"typer\.echo\(|(?<![\w.])print\(", path.read_text(encoding="utf-8"))
    }
    assert printing == set(PRINTERS)  # cli/output.py: echo


def test_tables_and_bars_come_from_one_file_that_takes_no_name_for_markup():
    made = re.compile(r"(?<!\w)(Console|Table|Text|TextColumn|Progress)\(")
    making = [name_of(path) for path in SOURCES if made.search(path.read_text(encoding="utf-8"))]
    assert making == ["livt_scale/util/tables.py"]


# --- the command line ---


HEAVY = ["torch", "timm", "torchvision", "deepspeed", "accelerate", "webdataset", "numpy", "scipy", "matplotlib"]


def run_python(code):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["shards", "--help"], ["--version"]])
def test_help_comes_without_torch(arguments):
    result = run_python(
        "import sys\nfrom livt_scale.cli.main import main\n"
        f"sys.argv = ['livt', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('heavy:', [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "heavy: []"


def test_the_check_before_a_run_needs_no_torch():
    result = run_python("import sys, livt_scale.train.preflight\nprint('torch' in sys.modules)")
    assert result.stdout == "False\n", result.stderr


def test_the_names_that_scripts_rely_on_are_there():
    commands = ["quickstart", "train", "eval", "export", "predict", "doctor", "ckpt ls", "ckpt verify", "ckpt convert"]
    commands += [f"shards {words}" for words in ("build", "verify", "index", "info", "trace")]
    commands += [f"recipe {words}" for words in ("show", "check", "schema")]
    assert {words: problem_in(f"livt {words}") for words in commands if problem_in(f"livt {words}")} == {}
    assert (ROOT / "recipes/fashion_mnist_lt/quickstart.yaml").is_file()
    fields = {".".join(path) for path in all_fields()}
    assert fields >= {"run_dir", "seed", "stages.pretrain.epochs", "stages.finetune.loss.name", "parallel.strategy"}
    assert fields >= {"parallel.precision", "checkpoint.every_steps", "checkpoint.mode", "data.train", "data.val"}
    assert fields >= {f"stages.{s}.{f}" for s in ("pretrain", "finetune") for f in ("global_batch", "micro_batch")}


# --- the documents ---


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):  # https:, mailto:
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file) if file else path
        if not linked.exists() or (anchor and anchor not in anchors_of(linked)):
            broken.append(target)
    assert broken == []


def test_the_files_that_the_architecture_names_exist():
    text = (ROOT / "docs/architecture.md").read_text()
    named = {name for name in re.findall(r"`([\w/.]+)`", text) if "/" in name or name.endswith(".py")}
    missing = sorted(name for name in named if not (ROOT / name).exists() and not (ROOT / "livt_scale" / name).exists())
    assert missing == []
    rows = re.findall(r"^\| (?!question|---).* \| `.*` \| (yes|nearly|no)\b.*\|$", text, re.MULTILINE)
    assert len(rows) >= 33
    assert rows.count("yes") >= 28


def test_every_room_is_in_the_architecture():
    text = (ROOT / "docs/architecture.md").read_text()
    rooms = {path.parent.name for path in (ROOT / "livt_scale").glob("*/__init__.py")}
    assert {room for room in rooms if f"`{room}/`" not in text} == set()


def anchors_of(path):
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands_in(text):
    """Every command line in fenced blocks, and inline code that starts with `livt ` or `make `."""
    fence = re.compile(r"^```[a-z]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
    lines = [line for block in fence.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:livt|make) [^`\n]+)`", fence.sub("", text))
    parts = [part.strip().removeprefix("$ ") for line in lines for part in re.split(r"&&|;", line)]
    return [part for part in parts if words_of(part)]


def words_of(line):
    """["livt" | "make", argument, …] of a shell line, whatever starts it (torchrun, srun, .venv/bin/); else []."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an open quote: prose, unless it starts like a command
        return [line.split()[0], "--open-quote"] if line.startswith(("livt ", "make ")) else []
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if "livt_scale" in words and words[words.index("livt_scale") - 1] == "-m":
        return ["livt", *words[words.index("livt_scale") + 1 :]]
    if words and Path(words[0]).name in ("livt", "make"):
        return [Path(words[0]).name, *words[1:]]
    return []


def problem_in(line):
    """What is wrong with a command line of a document; None if it could be run as it stands."""
    program, *words = words_of(line)
    return make_problem(words) if program == "make" else livt_problem(words)


def make_problem(words):
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    unknown = [w for w in words if "=" not in w and w not in targets]
    return f"no target {unknown}" if unknown else None


def livt_problem(words):
    command = main.command()
    words = list(words)
    while hasattr(command, "commands"):
        plain = [w for w in words if not w.startswith("-")]
        if not plain:
            return options_problem(command, words)
        if plain[0] not in command.commands:
            return f"no command {plain[0]}"
        words.remove(plain[0])
        command = command.commands[plain[0]]
    return options_problem(command, words)


def options_problem(command, words):
    known = {"--help"} | {name for parameter in command.params for name in parameter.opts if name.startswith("-")}
    unknown = [w for w in words if w.startswith("-") and w.split("=")[0] not in known]
    if unknown:
        return f"no option {unknown}"
    fields = {".".join(path) for path in all_fields()}
    sets = [value.split("=", 1)[0] for flag, value in itertools.pairwise(words) if flag == "--set"]
    wrong = [s for s in sets if s.replace("*", "finetune") not in fields and s != "…"]
    if wrong:
        return f"no field {wrong}"
    missing = [w for w in words if w.startswith(("recipes/", "shards/")) and "*" not in w and not (ROOT / w).exists()]
    return f"no file {missing}" if missing else None


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.name != "CHANGELOG.md"], ids=name_of)
def test_commands_in_documents_exist(path):
    found = {line: problem_in(line) for line in commands_in(path.read_text(encoding="utf-8"))}
    assert {line: problem for line, problem in found.items() if problem} == {}


def test_commands_in_recipe_heads_and_in_the_help_exist():
    heads = [m for p in RECIPES for m in re.findall(r"^# Command: +(.*?)(?: {2,}.*)?$", p.read_text(), re.MULTILINE)]
    examples = [line.strip() for line in main.EPILOG.splitlines() if words_of(line)]
    assert len(heads) >= 5
    assert len(examples) >= 3
    assert {line: problem_in(line) for line in [*heads, *examples] if problem_in(line)} == {}


def test_the_documents_do_show_commands_and_a_wrong_one_would_be_found():
    readme = commands_in((ROOT / "README.md").read_text())
    assert any(line.startswith("make quickstart") for line in readme)
    assert problem_in("livt trane recipes/x.yaml") == "no command trane"
    assert problem_in("livt train recipes/fashion_mnist_lt/quickstart.yaml --sett seed=1") == "no option ['--sett']"
    assert problem_in("livt train x.yaml --set sed=1") == "no field ['sed']"
    assert problem_in("torchrun -m livt_scale train recipes/none.yaml") == "no file ['recipes/none.yaml']"
    assert problem_in("make quickstop") == "no target ['quickstop']"


def test_recipes_in_yaml_blocks_of_documents_have_fields_that_exist():
    fields = {".".join(path) for path in all_fields()} | {"extends"}
    for path in DOCUMENTS:
        for block in re.findall(r"^```yaml\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            tree = yaml.safe_load(block)
            if isinstance(tree, dict) and {"extends", "stages"} & set(tree):
                assert {name for name in dotted(tree) if not name.startswith("model.args.")} <= fields, path


def dotted(tree, prefix=""):
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")


def test_paths_from_outside_are_resolved_by_one_function():
    """Path.resolve raises a RuntimeError for a link to itself; util/outside.py: real_path."""
    found = package_files_with(
        lambda node: (
            isinstance(node, ast.Attribute) and node.attr == "resolve" and "__file__" not in ast.unparse(node.value)
        )
    )
    assert found == set()
