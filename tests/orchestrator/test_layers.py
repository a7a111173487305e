"""The layers, by reading every import: independent of import-linter, and a check that its contracts name every module."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("search_spaces", "orchestrator", "cavs_model")  # each may import those after it
ALLOWED = {  # who may import it
    "ray": {"orchestrator.orphans", "orchestrator.ray_backend", "orchestrator.search"},
    "mlflow": {"orchestrator.tracker", "orchestrator.model_code"},  # the latter is stored with every model
    "optuna": {"orchestrator.search"},
}


def modules(package):
    """Module name -> file."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path, module=""):
    """Full names of what a file imports, wherever in the file the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            argument = node.args[0]
            names |= {argument.value} if isinstance(argument, ast.Constant) else set()
    return names


ALL = {name: path for package in LAYERS for name, path in modules(package).items()}


def test_the_modules_were_found():
    assert {"orchestrator.sweep", "cavs_model.methods.cmr", "search_spaces.tones", "cavs_model"} <= set(ALL)
    assert "ray.train" in imports(ALL["orchestrator.ray_backend"])


@pytest.mark.parametrize("library", ALLOWED)
def test_a_library_is_imported_where_it_is_allowed_and_nowhere_else(library):
    importing = {name for name, path in ALL.items() if any(each.split(".")[0] == library for each in imports(path))}
    assert importing == ALLOWED[library]


def test_imports_point_downwards():
    wrong = []
    for name, path in ALL.items():
        layer = LAYERS.index(name.split(".")[0])
        for imported in imports(path):
            top = imported.split(".")[0]
            # The command line looks questions up by name: no import in the sense of the layers.
            if top in LAYERS[:layer] and (name, imported) != ("orchestrator.cli", "search_spaces"):
                wrong.append((name, imported))
    assert wrong == []


@pytest.mark.parametrize("library", ALLOWED)
def test_import_linter_watches_every_module(library):
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    about = [each for each in contracts if each["type"] == "forbidden" and library in each["forbidden_modules"]]
    # A package stands for all that is below it, so that the pattern holds for modules that do not exist yet.
    watched = {source for contract in about for source in contract["source_modules"]}
    assert watched == {"orchestrator.*", "cavs_model", "search_spaces"}
    let_through = {each for contract in about for each in contract.get("ignore_imports", ())}
    assert let_through == {f"{module} -> {library}" for module in ALLOWED[library]}
    layers = next(contract for contract in contracts if contract["type"] == "layers")
    assert tuple(layers["layers"]) == LAYERS


def test_importing_has_no_side_effect(tmp_path):
    code = """
import importlib, os, signal, sys
before = (os.getcwd(), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
science = [name for name in sys.argv[1:] if name.startswith("cavs_model")]
for name in science:
    importlib.import_module(name)
heavy = {"ray", "mlflow", "optuna"} & set(sys.modules)
assert not heavy, f"cavs_model imported {heavy}"
import torch
torch_state = (torch.get_num_threads(), torch.initial_seed())
for name in sys.argv[1:]:
    importlib.import_module(name)
import ray, mlflow
assert not ray.is_initialized()
assert mlflow.active_run() is None
assert (torch.get_num_threads(), torch.initial_seed()) == torch_state
assert before == (os.getcwd(), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
"""
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    told = subprocess.run(
        [sys.executable, "-c", code, *ALL], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert list(home.iterdir()) == []
