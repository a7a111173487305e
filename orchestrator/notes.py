"""The description of a run in MLflow, in markdown: what was asked, what came out, how to do it again, what lies beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

TRIALS = 10  # shown in a note; all are in trials.csv


def note(question: str, facts: Mapping[str, str], result: str, command: str, artifacts: Mapping[str, str]) -> str:
    """A run's note. `question` is a search space's docstring, `result` markdown; `artifacts` maps what to look at to links."""
    told = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    links = "\n".join(f"- [{name}]({link})" for name, link in artifacts.items())
    return (
        f"### What\n\n{question.strip()}\n\n{told}\n\n### Result\n\n{result.strip()}\n\n"
        f"### Again\n\n```\n{command}\n```\n\n"
        "The same command goes on where it was cut off if it has a `--name`; what lies in the store is not computed again.\n\n"
        f"### Look at\n\n{links}\n"
    )


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A markdown table of the first rows; numbers to four digits, dotted paths by their last part."""

    def cell(value: Any) -> str:
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        return re.sub(r"[|\n]", " ", text)[:80]

    shown = [name if "/" in name else name.rsplit(".", 1)[-1] for name in columns]
    lines = ["| " + " | ".join(shown) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(name, "")) for name in columns) + " |" for row in rows[:TRIALS]]
    more = len(rows) - TRIALS
    return "\n".join(lines) + (f"\n\nand {more} more" if more > 0 else "")
