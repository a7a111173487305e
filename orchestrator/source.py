"""Which source files an outcome follows from, so that a new method's file makes no earlier outcome new.

All of `cavs_model` does, except the methods and data sets that the job neither is of nor imports.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import lru_cache
from importlib.util import resolve_name
from pathlib import Path

import cavs_model

CHOICES = ("methods", "datasets")  # packages of cavs_model with a file for each choice


def code_version() -> str:
    """A digest of the science's whole source."""
    root = _root()
    return _digest(root, tuple(sorted(root.rglob("*.py"))))


def code_of(*used: object) -> str:
    """A digest of the source that what is computed with `used`, methods and benchmarks, follows from.

    Where a class lies outside `cavs_model`, its file counts too.
    """
    modules = {type(one).__module__ for thing in used for one in _within(thing)}
    files = {(name, file) for name in modules if (file := getattr(sys.modules[name], "__file__", None)) is not None}
    root = _root()
    return _digest(root, _reached(root, tuple(sorted(files))))


def _root() -> Path:
    return Path(cavs_model.__file__).parent


def _within(thing: object) -> Iterator[object]:
    """A dataclass and those in its fields: a method may build on another."""
    yield thing
    if is_dataclass(thing):
        for item in fields(thing):
            if is_dataclass(value := getattr(thing, item.name)):
                yield from _within(value)


@lru_cache(maxsize=64)
def _reached(root: Path, used: tuple[tuple[str, str], ...]) -> tuple[Path, ...]:
    """The files of `used`, of all of `root` but its packages of choices, and what of those these import."""
    modules = {".".join((root.name, *path.relative_to(root).with_suffix("").parts)): path for path in root.rglob("*.py")}
    choices = tuple(f"{root.name}.{package}." for package in CHOICES)
    found = {name: path for name, path in modules.items() if not name.startswith(choices) or name.endswith(".__init__")}
    found |= {name: modules.get(name, Path(file)) for name, file in used}
    left = list(found.items())
    while left:
        name, path = left.pop()
        for imported in _imports(name.removesuffix(".__init__"), path):
            if imported in modules and imported not in found:
                found[imported] = modules[imported]
                left.append((imported, modules[imported]))
    return tuple(sorted(set(found.values())))


def _imports(module: str, path: Path) -> Iterator[str]:
    """What a file's import statements may name, wherever they stand: modules, and names that may be modules."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


@lru_cache(maxsize=64)
def _digest(root: Path, files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(root) if path.is_relative_to(root) else path.name).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
