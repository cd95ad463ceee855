"""The help screens: golden files, so that a change is seen; and the rules that hold for all of them."""

import pytest
from typer.testing import CliRunner

from livt_scale.cli.main import app
from livt_scale.cli.main import command as command_line


def commands(command=None, words=()):
    """(words, command) of every command and group."""
    command = command or command_line()
    yield words, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*words, name))


EVERY = {" ".join(words) or "livt": (words, command) for words, command in commands()}


@pytest.mark.parametrize("name", EVERY)
def test_the_help_is_what_somebody_last_read(name, golden):
    words, _ = EVERY[name]
    screen = CliRunner().invoke(app, [*words, "--help"], prog_name="livt", terminal_width=100)
    assert screen.exit_code == 0
    golden(f"cli/{name.replace(' ', '-')}.txt", screen.stdout)


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
