"""The help screens: golden files, so that a change is seen; and the rules that hold for all of them."""

import re

import pytest

from livt_scale.cli.main import command as command_line
from tests.cli.commands import livt


def commands(command=None, words=()):
    """(words, command) of every command and group."""
    command = command or command_line()
    yield words, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*words, name))


EVERY = {" ".join(words) or "livt": (words, command) for words, command in commands()}


@pytest.fixture(params=EVERY)
def screen(request, capsys):
    """(name, its help at 80 columns)"""
    with pytest.raises(SystemExit) as ended:
        command_line().main([*EVERY[request.param][0], "--help"], prog_name="livt", terminal_width=80)
    assert ended.value.code == 0
    return request.param, capsys.readouterr().out


def test_the_help_is_what_somebody_last_read(screen, golden):
    name, text = screen
    golden(f"cli/{name.replace(' ', '-')}.txt", text)


def test_the_help_fits_80_columns_and_cuts_no_summary_off(screen):
    _, text = screen
    lines = text.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    cut = [line for line in lines if line.endswith("...") and not line.startswith("Usage:")]
    assert cut == []


def test_metavars_are_types_in_angle_brackets_and_arguments_are_capitals(screen):
    _, text = screen
    options = re.findall(r"^  (?:-\w, )?--[\w-]+ (\S.*?)(?:  |$)", text, re.MULTILINE)
    assert [shown for shown in options if not re.fullmatch(r"<.+>|/ --no-.*", shown)] == []
    arguments = re.search(r"^Arguments:\n((?:  .*\n)+)", text, re.MULTILINE)
    for line in arguments[1].splitlines() if arguments else ():
        assert re.match(r"  ( |[A-Z_|]+ <\w+>)", line), line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(shell, capsys, monkeypatch):
    monkeypatch.setenv("_LIVT_COMPLETE", f"complete_{shell}")
    for name, value in (("COMP_WORDS", "livt tra"), ("COMP_CWORD", "1"), ("_TYPER_COMPLETE_ARGS", "livt tra")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    with pytest.raises(SystemExit):
        command_line().main([], prog_name="livt")
    assert "train" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, (words, _) in EVERY.items() if words])
def test_a_line_in_the_list_of_commands_is_one_short_sentence(name):
    line = (EVERY[name][1].help or "").splitlines()[0]
    assert 0 < len(line) <= 72
    assert line[0].isupper()
    assert line.endswith(".")


@pytest.mark.parametrize("name", EVERY)
def test_every_option_and_argument_has_a_help_text(name):
    texts = {parameter.name: getattr(parameter, "help", None) or "" for parameter in EVERY[name][1].params}
    assert {option: text for option, text in texts.items() if not text.endswith(".")} == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("submit", "a.yaml", "--wait-s", "60"), "--wait-s has no effect without --wait"),
        (("status", ".", "--every-s", "5"), "--every-s has no effect without --watch"),
        (("logs", ".", "--rank", "0", "-f"), "-f has no effect on it"),
    ],
)
def test_an_option_without_effect_is_refused(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("name: a\ndata: {train: t}\nstages: {finetune: {init: scratch}}\n")
    (tmp_path / "recipe.yaml").write_text("name: a\n")
    assert said in str(livt(*words).exception)
