"""Pieces of a report as one HTML page: pictures are inside it, nothing is fetched from elsewhere."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib.figure import Figure

COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#787774", "#cb912f")

_STYLE = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 80rem; margin: 0 auto; padding: 1.5rem; color: #222; background: #fff; }
h1 { font-size: 1.8rem; margin-bottom: 0.2rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.92rem; }
th, td { padding: 0.3rem 0.8rem; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; } th { background: #f6f6f4; }
.wide { overflow-x: auto; } figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
details { margin: 0.4rem 0; border: 1px solid #e4e4e0; border-radius: 4px; padding: 0.4rem 0.8rem; }
summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: 0.6rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.note { color: #666; font-size: 0.9rem; } mark { background: #ffe08a; }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page."""
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body>\n{body}\n</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A part of the page with a heading, and a name to link to."""
    name = title.lower().replace(" ", "-")
    return f'<section id="{html.escape(name)}"><h2>{html.escape(title)}</h2>\n' + "\n".join(parts) + "</section>"


def note(text: str) -> str:
    """A remark in small print."""
    return f"<p class='note'>{html.escape(text)}</p>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Names stand on the left, numbers on the right."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = ("".join(f"<td>{_cell(value)}</td>" for value in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


def figure(picture: Figure, caption: str) -> str:
    """A picture as SVG within the page; the words in it stay text."""
    target = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        picture.savefig(target, format="svg", metadata={"Date": None})
    drawing = target.getvalue()
    return f"<figure>{drawing[drawing.index('<svg') :]}<figcaption class='note'>{caption}</figcaption></figure>"
