"""What the source may never do: unpickle, evaluate text, start a shell, or listen on every interface.

Ray itself pickles what passes between the processes of one cluster, which a token guards; no file is read that way. A weight
file saved by torch is read by torch's own reader of tensors (weights_only), which calls nothing that the file names.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cavs_model", "orchestrator", "search_spaces")
# Called by the end of their dotted name, as what it stands for in the module.
FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "cPickle.load",
    "cPickle.loads",
    "dill.load",
    "dill.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "mlflow.pytorch.load_model",
    "mlflow.pyfunc.load_model",
    "torch.jit.load",
    "torch.hub.load",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "torch.package.PackageImporter",
}


def faults(source: str) -> Iterator[str]:
    """What a module does that it may not, as "line: what"."""
    tree = ast.parse(source)
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {
                each.asname or each.name.split(".")[0]: each.name if each.asname else each.name.split(".")[0]
                for each in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            known |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::"):
            yield f"{node.lineno}: {node.value}"
        if not isinstance(node, ast.Call):
            continue
        name, options = called(node.func, known), {each.arg: each.value for each in node.keywords}
        if name in FORBIDDEN:
            yield f"{node.lineno}: {name}"
        if name == "torch.load" and not is_true(options.get("weights_only")):
            yield f"{node.lineno}: torch.load without weights_only"
        if "allow_pickle" in options and not is_false(options["allow_pickle"]):
            yield f"{node.lineno}: allow_pickle"
        if "shell" in options and not is_false(options["shell"]):
            yield f"{node.lineno}: shell"


def called(function: ast.expr, known: dict[str, str]) -> str:
    parts: list[str] = []
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if not isinstance(function, ast.Name):
        return ""
    return ".".join([known.get(function.id, function.id), *reversed(parts)]).removeprefix("builtins.")


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_the_source_never_does_what_a_stranger_s_file_could_use() -> None:
    assert len(SOURCES) > 50
    assert {str(path): found for path in SOURCES if (found := list(faults(path.read_text())))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(x)",
        "import torch as t\nt.load(x, weights_only=False)",
        "from torch import load as read\nread(x)",
        "import torch\ntorch.load(x, weights_only=flag)",
        "import pickle\npickle.loads(x)",
        "from pickle import Unpickler\nUnpickler(x).load()",
        "import numpy as np\nnp.load(x, allow_pickle=True)",
        "import mlflow.pytorch\nmlflow.pytorch.load_model(x)",
        "import yaml\nyaml.load(x)",
        "eval('1')",
        "import builtins\nbuiltins.exec('1')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
        "host = '0.0.0.0'",
    ],
)
def test_each_of_them_would_be_seen(source: str) -> None:
    assert len(list(faults(source))) == 1


def test_what_is_allowed_is_not_taken_for_it() -> None:
    fine = "import json, re, torch\njson.loads(x)\nre.compile(x)\ntorch.load(x, weights_only=True)\nmodel.eval()\nself.load(x)"
    assert list(faults(fine)) == []
