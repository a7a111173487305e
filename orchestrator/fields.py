"""What every field of an experiment means, read from the classes that define it: comments beside fields, bounds of knobs.

One place to say what a field does: the source. `--help` and `--help-fields` print what stands there.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import tokenize
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from orchestrator.experiment import Experiment, choices_of, file_name

LATER_LINES = 8  # of a comment's continuation, above a field


@dataclass(frozen=True)
class Described:
    """A field of an experiment."""

    path: str
    kind: str  # its type, or the values it may take
    value: str
    doc: str


def described(value: Any = None, prefix: str = "") -> Iterator[Described]:
    """Every field below a dataclass by dotted path, in the order in which they are written."""
    value = Experiment() if value is None else value
    defined: Any = type(value)
    hints, docs = typing.get_type_hints(defined), _docs(defined)
    for item in dataclasses.fields(value):
        path, content, kind = f"{prefix}{item.name}", getattr(value, item.name), hints[item.name]
        choices = choices_of(kind) if isinstance(kind, type) else None
        if choices is not None:
            doc = docs.get(item.name, "") or _first_sentence(type(content))
            yield Described(path, " | ".join(sorted(choices)), file_name(content), doc)
            yield from described(content, f"{path}.")
        elif dataclasses.is_dataclass(content):
            yield from described(content, f"{path}.")
        else:
            yield Described(path, _kind(kind, item.metadata), _shown(content), docs.get(item.name, ""))


def text(value: Any = None, width: int = 128) -> str:
    """The fields as lines: path, value, type or choices, and what they mean."""
    lines = []
    for each in described(value):
        head = f"  {each.path}={each.value}  ({each.kind})"
        doc = f"  {each.doc}" if each.doc else ""
        lines += [head + doc] if len(head + doc) <= width else [head, f"     {doc}"] if doc else [head]
    return "\n".join(lines)


def _kind(kind: Any, metadata: Mapping[str, Any]) -> str:
    """A type in words, with the bounds of a knob."""
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    name = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    if typing.get_origin(kind) is tuple:
        name = f"{typing.get_args(kind)[0].__name__}, ..."
    least, most = metadata.get("at_least"), metadata.get("at_most")
    low = "" if least is None else f", at least {least:g}"
    return f"{name.replace(' | None', ' or none')}{low}{'' if most is None else f', at most {most:g}'}"


def _shown(value: Any) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _first_sentence(kind: Any) -> str:
    return re.split(r"(?<=\.)\s|\n\n", inspect.cleandoc(kind.__doc__ or ""), maxsplit=1)[0].replace("\n", " ")


@cache
def _docs(kind: Any) -> dict[str, str]:
    """Field -> the comment on its line, or what the docstring of its class says of it by name; of base classes too."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if "__dataclass_fields__" not in vars(each):
            # A field may be announced as a property of a base class.
            found |= {name: _first_sentence(part) for name, part in vars(each).items() if isinstance(part, property)}
            continue
        try:
            source = inspect.getsource(each)
        except (OSError, TypeError):  # made at run time
            continue
        found |= {name: doc for name, doc in _of_source(source).items() if doc or name not in found}
    return found


def _of_source(source: str) -> dict[str, str]:
    source = inspect.cleandoc("\n" + source)
    comments = {
        token.start[0]: (token.string.lstrip("# ").strip(), token.line.strip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    explained = ast.get_docstring(definition) or ""
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        # A field may take several lines; its comment stands at the end of the first or the last of them.
        beside = [comments[line][0] for line in (node.lineno, node.end_lineno) if line in comments and not comments[line][1]]
        above: list[str] = []
        for line in range(node.lineno - 1, node.lineno - LATER_LINES, -1):
            if line not in comments or not comments[line][1]:
                break
            above.insert(0, comments[line][0])
        named = [part for part in re.split(r"(?<=\.)\s+", explained.replace("\n", " ")) if f"`{node.target.id}`" in part]
        found[node.target.id] = (beside or [" ".join(above)] * bool(above) or named or [""])[0]
    return found
