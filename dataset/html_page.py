"""One HTML page in one file: no scripts, nothing loaded from elsewhere. Knows nothing about what a page shows."""

from __future__ import annotations

import html


def html_page(title: str, *, style: str, body: str) -> str:
    """Return a whole HTML document. title: plain text, escaped here. style: CSS. body: HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>{body}</body></html>"
    )
