"""A page that stands alone: no network, no script, pictures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; border-bottom: 1px solid #ccc; margin-top: 2rem; }
.curves { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem; }
figure { margin: 0; max-width: 100%; }
figcaption { font-size: .85rem; color: #555; } img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
td, th { border: 1px solid #ddd; padding: .15rem .5rem; text-align: left; overflow-wrap: anywhere; min-width: 4.5rem; }
td:first-child { white-space: nowrap; }
"""


def document(title: str, body: Sequence[str]) -> str:
    """Returns the page around parts of a body.

    Args:
        title: plain text.
        body: HTML.
    """
    head = (
        f"<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    )
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def picture(data: bytes, kind: str = "png") -> str:
    """Returns the source of an `img`: the picture itself."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of plain text, whose first row is the head."""
    if len(rows) < 2:
        return "<p>Nothing is on record.</p>"
    lines = []
    for index, row in enumerate(rows):
        tag = "th" if index == 0 else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return f"<div class='wide'><table>{''.join(lines)}</table></div>"


def grid(pictures: Sequence[tuple[str, str]]) -> str:
    """Returns pictures of their own size, side by side as far as the page is wide, from (title, source)."""
    figures = [
        f"<figure><img src='{source}' alt='{html.escape(title, quote=True)}'><figcaption>{html.escape(title)}"
        "</figcaption></figure>"
        for title, source in pictures
    ]
    return f"<div class='curves'>{''.join(figures)}</div>"
