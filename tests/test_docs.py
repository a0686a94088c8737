"""What the documents tell people to type exists: every hybrid-* command line parses, every linked file is there."""

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def programs():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    return {name: importlib.import_module(target.split(":")[0]).command for name, target in scripts.items()}


def command_lines():
    """Every `hybrid-...` line of a code block, and every one between backticks, with the document it is from."""
    for document in DOCUMENTS:
        text = document.read_text()
        blocks = re.findall(r"^(?: {4,}|\$ )?(hybrid-[a-z]+ .+)$", text, re.MULTILINE)
        inline = re.findall(r"`(hybrid-[a-z]+ [^`]+)`", text)
        for line in dict.fromkeys([*blocks, *inline]):
            yield pytest.param(line, id=f"{document.name}: {line[:60]}")


def check_options(line: str) -> None:
    """Raise click.UsageError for a program, subcommand or option that does not exist."""
    program, *words = shlex.split(
        line.split("  #", maxsplit=1)[0].split(" | ", maxsplit=1)[0].replace("\\|", "|"), comments=True
    )
    command = programs()[program]
    context = click.Context(command, info_name=program)
    if isinstance(command, click.Group):
        subcommand = command.get_command(context, words[0])
        if subcommand is None:
            raise click.UsageError(f"{program} has no {words[0]}")
        command, words = subcommand, words[1:]
        context = click.Context(command, info_name=program)
    known = {name for option in command.get_params(context) for name in (*option.opts, *option.secondary_opts)}
    for word in words:
        if word.startswith("-") and word.split("=")[0] not in known and "|" not in word:
            raise click.UsageError(f"{program} has no option {word}")


@pytest.mark.parametrize("line", list(command_lines()))
def test_every_documented_command_line_has_only_options_that_exist(line):
    check_options(line)


def test_there_are_documented_command_lines():
    assert len(list(command_lines())) >= 8


def test_the_check_refuses_an_option_that_does_not_exist():
    with pytest.raises(click.UsageError, match="no option --speed"):
        check_options("hybrid-run --speed 9")
    with pytest.raises(click.UsageError, match="has no bleu"):
        check_options("hybrid-eval bleu")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_inside_the_repository_leads_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
