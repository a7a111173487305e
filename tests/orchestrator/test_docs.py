"""docs/ against the code: examples run as they stand, links lead somewhere, quoted messages exist, public names speak."""

import ast
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


def messages():
    """Every text of the sources, with an ellipsis where a value stands."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                text = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                yield re.sub("…+", "…", text)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def quoted():
    """The messages of the troubleshooting page's tables, Ray's own left out."""
    rows = re.findall(r"^\| (`.+?) \| ", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    return [text for row in rows if "Ray's own" not in row for text in re.findall(r"`([^`]+)`", row)]


def test_quoted_messages_are_in_the_source():
    known = list(messages())
    gone = [text for text in quoted() if not any(text in message for message in known)]
    assert not gone
    assert len(quoted()) > 50


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
