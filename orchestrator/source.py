"""Which source files an outcome follows from, so that a new method's file makes no earlier outcome new.

All of `cavs_model` does, except the methods and data sets that the job neither is of nor imports. Where a class lies elsewhere,
its file does, and what that imports from beside it; what was installed does not.
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
OURS = ("cavs_model", "orchestrator")  # never beside a class: of the first it is known what counts, of the second nothing does
INSTALLED = {"site-packages", "dist-packages"}  # folders whose packages are not beside a class either


def code_version() -> str:
    """A digest of the science's whole source."""
    root = _root()
    return _digest(root, tuple(sorted(root.rglob("*.py"))))


def code_of(*used: object) -> str:
    """A digest of the source that what is computed with `used`, methods and benchmarks, follows from.

    Where a class lies outside `cavs_model`, its file counts too, with what it imports from its folder or its package.
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
    left = [(name, path, None if path.is_relative_to(root) else _home(name, path)) for name, path in found.items()]
    files = set()
    while left:
        name, path, home = left.pop()
        if path in files:
            continue
        files.add(path)
        for imported in _imports(name.removesuffix(".__init__"), path):
            if imported in modules:
                left.append((imported, modules[imported], None))
            elif home and imported.partition(".")[0] not in OURS:
                left.extend((beside, file, home) for beside, file in _beside(imported, *home))
    return tuple(sorted(files))


def _home(name: str, path: Path) -> tuple[Path, Path]:
    """Where the imports of a module begin, and below which folder what they find lies beside it: its own, or its package's."""
    parts, place = name.split("."), path.parent if path.name == "__init__.py" else path.with_suffix("")
    if (len(parts) > 1 or path.name == "__init__.py") and place.parts[-len(parts) :] == tuple(parts):
        above = place.parents[len(parts) - 1]
        return above, above / parts[0]
    return path.parent, path.parent


def _beside(imported: str, above: Path, below: Path) -> Iterator[tuple[str, Path]]:
    """The modules that an import runs, and their files, of those below a folder."""
    parts = imported.split(".")
    for length in range(1, len(parts) + 1):
        stem = above.joinpath(*parts[:length])
        for file in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
            if file.is_relative_to(below) and not INSTALLED & set(file.parts) and file.is_file():
                yield ".".join(parts[:length]), file


def _imports(module: str, path: Path) -> Iterator[str]:
    """What a file's import statements may name, wherever they stand: modules, and names that may be modules."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                origin = resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # it is for whoever runs the file as a part of a package
                continue
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


@lru_cache(maxsize=64)
def _digest(root: Path, files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(root) if path.is_relative_to(root) else path.name).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
