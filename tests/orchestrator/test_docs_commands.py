"""Every command that README and docs/ show is parsed by its own verb's arguments, and not run: options, names and fields."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from cavs_model.errors import InputError
from orchestrator import cli, compare
from orchestrator.experiment import override, parse_assignments

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.M | re.S)
VERB = re.compile(r"(?:^|\s)(?:[\w./]*/)?python -m orchestrator\.([a-z_]+)((?:\s.*)?)$")
MAKE = re.compile(r"(?:^|\s)make( .*)$")
SLURM = re.compile(r"(?:^|\s)deploy/slurm\.sh( .*)$")
RECORDS = ("results.md", "log.md")  # of what was run at earlier commits, where entries and fields had other names
# The methods and data sets that a reader of the pages writes.
WRITTEN = {name for page in PAGES for name in re.findall(r"^# cavs_model/\w+/(\w+)\.py$", page.read_text(), re.M)}


def code(text):
    """The lines of a page's blocks but those that are to fail, continued ones joined, and what stands between backquotes."""
    blocks = [block for _, note, block in FENCE.findall(text) if note.strip() != "fails"]
    text = FENCE.sub("", text)
    indented = re.findall(r"^ {4,}(?![-*] )(.*)$", text, re.M)
    joined = re.sub(r"\\\n\s*", "", "\n".join([*blocks, *indented]))
    prose = re.sub(r"^ {4,}.*$", "", text, flags=re.M)
    return [*joined.splitlines(), *(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))]


def quoted():
    """The messages in the first column of the troubleshooting page."""
    rows = re.findall(r"^\| (`.+?) \| ", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    return {text for row in rows for text in re.findall(r"`([^`]+)`", row)}


def words_of(text):
    """The words of a command, of a choice such as `list|verify` the first; what the shell takes for a comment is none."""
    return [word.partition("|")[0] for word in shlex.split(text, comments=True)]


def commands():
    """(page, verb, words) of every command line: python -m orchestrator.<verb>, make <verb> and deploy/slurm.sh."""
    for page in PAGES:
        for line in code(page.read_text()):
            if page.name == "troubleshooting.md" and line in quoted():
                continue  # what a command says, in which one may be named
            if found := VERB.search(line):
                yield page.name, found[1], words_of(found[2])
            elif found := SLURM.search(line):
                yield page.name, "sweep", words_of(found[1])
            elif found := MAKE.search(line):
                yield page.name, "make", words_of(found[1])


COMMANDS = list(commands())


def of_make(words):
    """The verb and words that `make` calls with these arguments, none for a target that calls no verb."""
    [target] = [word for word in words if "=" not in word]
    given = dict(word.split("=", 1) for word in words if "=" in word)
    defaults = dict(re.findall(r"^(\w+) \?= ?(.*)$", MAKEFILE, re.M))
    assert set(given) <= set(defaults), "the Makefile has no such variable"
    rule = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", MAKEFILE, re.M)
    assert rule, f"the Makefile has no target {target}"
    called = re.search(r"python -m orchestrator\.(\w+) (.*)$", rule[1], re.M)
    if called is None:
        return None, []
    text = re.sub(r"\$\((\w+)\)", lambda name: given.get(name[1], defaults[name[1]]), called[2])
    return called[1], words_of(text)


class Parsed(BaseException):
    """Raised where a verb would begin; no `except` of a verb's stands in its way."""


@pytest.fixture
def parse(monkeypatch, capsys):
    """What a verb makes of words; an AssertionError with what it says of wrong ones. Nothing is run."""
    original, depth = argparse.ArgumentParser.parse_known_args, [0]

    def parse_known_args(self, args=None, namespace=None):
        depth[0] += 1
        try:
            found, rest = original(self, args, namespace)
        finally:
            depth[0] -= 1
        if depth[0]:  # of a verb within a verb
            return found, rest
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        raise Parsed(found)

    def parse(verb, words):
        path = ROOT / "orchestrator" / f"{verb}.py"
        path = path if path.is_file() else ROOT / "orchestrator" / verb / "__main__.py"
        assert path.is_file(), f"there is no verb {verb}"
        main = re.search(r"cli\.main\((?:(\w+)\.)?(\w+)\)", path.read_text())
        module = main[1] or ".".join(path.relative_to(ROOT / "orchestrator").with_suffix("").parts)
        function = getattr(importlib.import_module(f"orchestrator.{module}"), main[2])
        monkeypatch.setattr(sys, "argv", [verb, *words])
        try:
            function()
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit as ended:
            if ended.code == 0:  # --help
                return None
            raise AssertionError(capsys.readouterr().err) from ended
        raise AssertionError(f"{verb} parsed nothing")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    return parse


def there(space):
    """Whether a search space is ours: not one that the reader is to write, nor a word that stands for any."""
    return (ROOT / space).is_file() if space.endswith(".py") else space not in ("SPACE", "…")


@pytest.mark.parametrize(("page", "verb", "words"), COMMANDS, ids=[f"{page}-{verb}" for page, verb, _ in COMMANDS])
def test_shown_commands_are_understood(page, verb, words, parse):
    if verb == "make":
        verb, words = of_make(words)
        if verb is None:
            return
    found = parse(verb, words)
    if found is None or not hasattr(found, "assignments"):
        return
    spaces = found.space if isinstance(found.space, list) else [found.space]
    changes = parse_assignments(found.assignments)
    if page not in RECORDS and all(there(space) for space in spaces):
        try:
            loaded = [cli.load_space(space) for space in spaces]
            if hasattr(found, "only"):
                entries = compare.entries_of(loaded, found.only, changes)
                assert found.reference in ("", *entries)
            elif not WRITTEN & {*changes.values()}:
                override(loaded[0].base, changes)
        except InputError as error:
            raise AssertionError(f"{page}: {verb} {shlex.join(words)}: {error}") from error


def test_commands_were_found():
    assert {verb for _, verb, _ in COMMANDS} >= {
        "sweep", "run", "compare", "check", "check_data", "status", "report", "predict", "store", "contact_sheet", "make",
    }  # fmt: skip
    assert len(COMMANDS) > 50


@pytest.mark.parametrize(
    ("verb", "words"), [("sweep", "--trails 3"), ("sweep", "--wall-clock soon"), ("store", "prune"), ("report", "")]
)
def test_a_command_that_does_not_exist_is_not_understood(verb, words, parse):
    with pytest.raises(AssertionError, match="usage"):
        parse(verb, words.split())
