"""docs/ against the code: examples run as they stand, links lead somewhere, quoted messages exist, public names speak."""

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("cavs_model", "orchestrator")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.M | re.S)


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))


def anchors(page):
    """The names that GitHub gives to the page's headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"


# Troubleshooting: what its rows quote is in the source, and what the source can say to a user is quoted by a row.

ERRORS = {"InputError", "DivergedError"}  # and what is derived from them
LEAST_LETTERS = 3  # of a quote, so that `… … …` is none of everything

# What needs no row, with the reason.
SELF_EXPLAINING = (
    "--yes deletes, --dry-run and --debug only show; leave out one of the two",  # two arguments of one command line
)


def squeezed(text):
    return re.sub("…+", "…", text)


def told(node):
    """The texts that an expression may have, with an ellipsis where a value stands; each side of a condition is one."""
    if isinstance(node, ast.Constant):
        return {str(node.value)}
    if isinstance(node, ast.JoinedStr):
        parts = [told(part) for part in node.values]
        return {squeezed("".join(each)) for each in itertools.product(*parts)}
    if isinstance(node, ast.FormattedValue):
        return told(node.value) if isinstance(node.value, ast.IfExp | ast.JoinedStr) else {"…"}
    if isinstance(node, ast.IfExp):
        return told(node.body) | told(node.orelse)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return {squeezed(left + right) for left in told(node.left) for right in told(node.right)}
    return {"…"}


def trees():
    return [ast.parse(path.read_text()) for path in SOURCES]


def messages():
    """Every text of the sources."""
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                yield from told(node)


def derived():
    """The names of the classes of ERRORS and of those derived from them."""
    classes = [node for tree in trees() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    kinds, before = set(ERRORS), set()
    while kinds != before:
        before = set(kinds)
        kinds |= {each.name for each in classes for base in each.bases if isinstance(base, ast.Name) and base.id in kinds}
    return kinds


def makers(tree, kinds):
    """What makes errors in a file: the classes, names for one of several, and functions that are given an error's `text`."""
    names = set(kinds)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.IfExp):
            sides = (node.value.body, node.value.orelse)
            if all(isinstance(side, ast.Name) and side.id in kinds for side in sides):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef) and isinstance(node.returns, ast.Name) and node.returns.id in kinds:
            names |= {node.name for first in node.args.args[:1] if first.arg == "text"}
    return names


def errors():
    """The texts of all errors that are told in one line. What only passes another text on has no letters and is left out."""
    kinds = derived()
    for tree in trees():
        names = makers(tree, kinds)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and node.args:
                yield from (text for text in told(node.args[0]) if re.search("[a-z]", text))


def quoted():
    """The messages of the troubleshooting page's tables, Ray's own left out."""
    rows = re.findall(r"^\| (`.+?) \| ", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    return [text for row in rows if "Ray's own" not in row for text in re.findall(r"`([^`]+)`", row)]


def test_quoted_messages_are_in_the_source():
    known = list(messages())
    gone = [text for text in quoted() if not any(text in message for message in known)]
    assert not gone
    assert len(quoted()) > 50


def test_every_message_is_quoted_or_explains_itself():
    quotes = quoted()
    assert [text for text in quotes if len(re.findall("[A-Za-z]", text)) < LEAST_LETTERS] == []
    said = set(errors())
    missing = [text for text in said if text not in SELF_EXPLAINING and not any(quote in text for quote in quotes)]
    assert sorted(missing) == []
    assert set(SELF_EXPLAINING) <= said
    assert len(said) > 200


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_are_described(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module says nothing of itself"
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


# The examples: in a copy of the packages, so that new files can be put among the old ones.


@pytest.fixture
def copy(tmp_path):
    for package in (*PACKAGES, "search_spaces"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("collage_pack", "__pycache__"))
    (tmp_path / "cavs_model" / "datasets" / "collage_pack").symlink_to(ROOT / "cavs_model" / "datasets" / "collage_pack")
    return tmp_path


RUNNER = """
import importlib, shlex, sys
from orchestrator import cli, sweep
from cavs_model.errors import InputError

def no_cluster(verbose):
    raise InputError("as far as without a cluster")

sweep.connected = no_cluster
for line in open("steps.txt"):
    words, kind, text = line.partition(" ")[0], *eval(line.partition(" ")[2])
    if words == "python":
        exec(compile(text, kind, "exec"), {})
        continue
    for command in filter(None, text.splitlines()):
        _, _, module, *arguments = shlex.split(command)
        sys.argv = [module.rpartition(".")[2], *arguments]
        verb = getattr(importlib.import_module(module), sys.argv[0])
        print(">>>", command, "->", cli.main(verb), flush=True)
"""


def run_page(page, copy):
    """Writes the page's files, then runs its commands and its nameless Python; what was printed."""
    steps = []
    for language, note, text in BLOCK.findall((ROOT / "docs" / page).read_text()):
        title = re.match(r"# (at the end of )?(\S+\.py)\n", text)
        if language == "python" and title:
            with open(copy / title[2], "a" if title[1] else "w") as file:
                file.write(text.removeprefix(title[0]))
        elif language in ("python", "bash"):
            steps.append(f"{language} {(note.strip(), text)!r}")
    (copy / "steps.txt").write_text("\n".join(steps))
    environment = {name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "CAVS_OUTPUTS")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}
    process = subprocess.run(
        [sys.executable, "-c", RUNNER], cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    assert process.returncode == 0, process.stdout + process.stderr
    wanted = {"fails": "-> 2", "cluster": "-> 2", "": "-> 0"}
    for language, note, text in BLOCK.findall((ROOT / "docs" / page).read_text()):
        for command in filter(None, text.splitlines() if language == "bash" else ()):
            assert f">>> {command} {wanted[note.strip()]}" in process.stdout, process.stdout + process.stderr
    return process.stdout, process.stderr


def test_the_tutorial_runs(copy):
    shown, errors = run_page("tutorial.md", copy)
    assert "did you mean 'schedule.epochs'?" in errors
    assert "error: as far as without a cluster" in errors
    assert "6 streams, 0 done before" in shown
    assert re.search(r"[1-9]\d* reused", shown)  # the base task, by the second run
    assert shown.splitlines()[-1] == "(1, 2, 32, 32)"
    old = {name: float(value) for name, value in re.findall(r"^\| (.+?) \| [\d.]+ ± [\d.]+ \| ([\d.]+) ±", shown, re.M)}
    assert old["finetune"] == pytest.approx(old["background alone"], abs=0.02)  # what the page says comes out
    assert old["recent over lwf"] > old["recent"] > old["finetune"] + 0.02


def test_what_extending_shows_runs_together(copy):
    shown, _ = run_page("extending.md", copy)
    assert "anchor blocks 2-2: seed 0 task 2/2 learned" in shown
