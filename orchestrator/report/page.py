"""HTML of a report: elements as text, everything from outside escaped, nothing fetched from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from orchestrator import figures
from orchestrator.report.clips import Clip

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A page from a mail must not be able to call home, whatever a name in it says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; media-src data:"


@dataclass(frozen=True)
class Section:
    """A part of the page, with a name for the table of contents. `key` is its anchor."""

    key: str
    title: str
    body: str


def document(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page. `title` is text; `lead` and the sections' bodies are HTML."""
    here = files("orchestrator.report")
    css, script = ((here / name).read_text() for name in ("page.css", "page.js"))
    shown = [section for section in sections if section.body]
    contents = "".join(f'<li><a href="#{escape(each.key)}">{escape(each.title)}</a></li>' for each in shown)
    bodies = "\n".join(
        f'<section id="{escape(each.key)}"><h2>{escape(each.title)}</h2>\n{each.body}</section>' for each in shown
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{css}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>
{lead}
<nav aria-label="Contents"><ul>{contents}</ul></nav></header>
<main>
{bodies}
</main>
<script>
{script}</script>
</body>
</html>
"""


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, and where values are numbers how they are shown."""

    head: str
    form: str = ""  # a format such as ".3f"; empty for text
    spread: str = ""  # the key of a spread that is shown behind the value


def table(caption: str, columns: Mapping[str, Column], rows: Sequence[Mapping[str, Any]], best: int | None = None) -> str:
    """A table that sorts: rows of values by column key; a missing one leaves its cell empty. Row `best` is in bold.

    Cells keep their unrounded value as data-value.
    """
    if not rows:
        return ""
    heads = "".join(
        f'<th scope="col"{_text_class(column)} aria-sort="none"><button type="button">{escape(column.head)}</button></th>'
        for column in columns.values()
    )
    lines = []
    for number, row in enumerate(rows):
        cells = []
        for place, (key, column) in enumerate(columns.items()):
            value = row.get(key)
            shown, kept = _cell(value, column, row)
            mark = "th" if place == 0 else "td"
            scope = ' scope="row"' if place == 0 else ""
            cells.append(f'<{mark}{scope}{_text_class(column)} data-value="{escape(kept)}">{escape(shown)}</{mark}>')
        lines.append(f'<tr class="best">{"".join(cells)}</tr>' if number == best else f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(lines)
    name = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table><caption><span>{name}</span></caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>\n"
    )


def _text_class(column: Column) -> str:
    return "" if column.form else ' class="text"'


def _cell(value: Any, column: Column, row: Mapping[str, Any]) -> tuple[str, str]:
    """What is shown and what is kept of a value."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return "", ""
    if not column.form:
        return str(value), str(value)
    if not isinstance(value, (int, float)):
        return str(value), str(value)
    spread = row.get(column.spread)
    more = f" ± {spread:{column.form}}" if isinstance(spread, float) else ""
    return f"{value:{column.form}}{more}", repr(value)


def figure(name: str, drawn: Figure, title: str, caption: str) -> str:
    """A figure with its title and what it shows; `name` is unique on the page."""
    picture = figures.svg(drawn, name).replace("<svg ", f'<svg role="img" aria-label="{escape(f"{title}. {caption}")}" ', 1)
    return f"<figure><h4>{escape(title)}</h4>{picture}<figcaption>{escape(caption)}</figcaption></figure>\n"


def grid(parts: Sequence[str], uneven: bool = False) -> str:
    """Figures side by side where there is room: in rows, or where they are unevenly high in columns."""
    shown = [part for part in parts if part]
    return f'<div class="{"columns" if uneven else "figures"}">\n{"".join(shown)}</div>\n' if shown else ""


@dataclass
class Room:
    """What is left for clips on a page, in bytes of its text: a mail takes only so much."""

    pictures: int = 8 * 2**20
    sounds: int = 8 * 2**20


def clips(found: Sequence[Clip], room: Room) -> str:
    """Clips with their tiles and sounds, as long as there is room for them; what is left out is told."""
    cards, left_out = [], 0
    for clip in found:
        size = sum(len(tile.data) for tile in clip.tiles)
        if size > room.pictures:
            left_out += 1
            continue
        room.pictures -= size
        tiles = "".join(
            f'<div><img src="{tile.data}" alt="{escape(tile.alt)}">{escape(tile.title)}</div>' for tile in clip.tiles
        )
        legend = "".join(f'<li><i style="background:{colour}"></i>{escape(name)}</li>' for name, colour in clip.legend)
        heard = ""
        if clip.sound and len(clip.sound) <= room.sounds:
            room.sounds -= len(clip.sound)
            heard = (
                f'<audio controls preload="metadata" src="{clip.sound}" aria-label="{escape(f"sound of {clip.name}")}"></audio>'
            )
        elif clip.sound:
            heard = '<p class="note">Its sound was left out to keep this file small.</p>'
        told = f"sounding: {', '.join(clip.sounding)}" + (f"; {clip.note}" if clip.note else "")
        cards.append(
            f'<article class="clip"><h4>{escape(clip.name)}</h4><p class="note">{escape(told)}</p>'
            f'<div class="tiles">{tiles}</div><ul class="legend">{legend}</ul>{heard}</article>'
        )
    told = paragraphs([f"{left_out} clips were left out to keep this file small."]) if left_out else ""
    return (f'<div class="clips">\n{"".join(cards)}\n</div>\n' if cards else "") + told


def paragraphs(lines: Sequence[str]) -> str:
    """Text as paragraphs."""
    return "".join(f"<p>{escape(line)}</p>\n" for line in lines if line)


def facts(caption: str, values: Mapping[str, Any]) -> str:
    """Names and values as a table of two columns."""
    rows = [{"name": name, "value": _plain(value)} for name, value in values.items()]
    return table(caption, {"name": Column("name"), "value": Column("value")}, rows)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None or value == "" else str(value)


def command(text: str) -> str:
    """A command to be copied."""
    return f"<pre><code>{escape(text)}</code></pre>\n"


def details(title: str, body: str) -> str:
    """Something to be opened."""
    return f"<details><summary>{escape(title)}</summary>\n{body}</details>\n" if body else ""
