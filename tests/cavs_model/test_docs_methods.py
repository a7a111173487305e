"""docs/methods.md against the code: every method and knob is in it, defaults are the true ones, and what it names is there."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

import cavs_model.methods
from cavs_model.methods.base import Method
from orchestrator.experiment import Experiment, members, override, parse_assignments

TEXT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
METHODS = members(cavs_model.methods, Method)
SETTINGS = re.findall(r"`(--set [^`]+)`", TEXT)
NAMES = sorted(set(re.findall(r"`([a-z_]+(?:\.\w+)+)`", TEXT)))


def tables(section):
    """Header and rows of every table, cells as lists."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", SECTIONS[section], re.M):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        assert set("".join(rows[1])) == {"-"}
        assert {len(row) for row in rows} == {len(rows[0])}
        found.append((rows[0], rows[2:]))
    return found


def test_every_method_has_a_section():
    assert set(SECTIONS) == set(METHODS)


@pytest.mark.parametrize("name", SECTIONS)
def test_sections_have_one_format(name):
    headers = [header for header, _ in tables(name)]
    assert headers[0] == ["what it says", "function"]
    assert headers[1][0] == "point"
    assert headers[1][1] == "paper"
    assert headers[1][3] == "ours"
    assert f"`methods.{name}.{METHODS[name].__name__}`" in SECTIONS[name]
    for _, rows in tables(name):
        assert all(cell for row in rows for cell in row)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_knob_stands_with_its_default_and_its_source(name):
    knobs = {row[0]: row for header, rows in tables(name) if header == ["field", "default", "source"] for row in rows}
    fields = [item.name for item in dataclasses.fields(METHODS[name])]
    assert list(knobs) == [f"`{field}`" for field in fields]
    for field in fields:
        default = knobs[f"`{field}`"][1]
        text = re.fullmatch("`(.+)`", default)[1]
        told = override(Experiment(), {"method": name, f"method.{field}": text}).method
        assert told == METHODS[name](), f"{name}.{field} is {getattr(METHODS[name](), field)}, not {text}"
    if not fields:
        assert "It has no knob." in SECTIONS[name]


@pytest.mark.parametrize("name", [each for each in NAMES if not each.startswith("base.")])
def test_what_is_named_is_there(name):
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["cavs_model", *parts[:split]]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part)
        return
    raise AssertionError(f"no module of cavs_model begins {name}")


@pytest.mark.parametrize("line", SETTINGS)
def test_lines_of_settings_are_understood_and_change_something(line):
    changes = parse_assignments(line.removeprefix("--set ").split(" --set "))
    changed = override(Experiment(), changes)
    assert changed != Experiment()


def test_something_was_found():
    assert len(SETTINGS) > 15
    assert len(NAMES) > 30
