"""The search page: one file without anything from elsewhere, which the browser is told to hold to its own script and style."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import HTMLResponse

FILE = Path(__file__).with_name("search.html")


def policy(html: str) -> str:
    """The Content-Security-Policy under which exactly this page's inline script and style run, and nothing else."""
    allowed = {}
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        allowed[tag] = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{allowed['script']}'; style-src 'sha256-{allowed['style']}'; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def add(app: FastAPI, keys: bool) -> None:
    """Serve the page at /; without keys its box for one is left out."""
    html = FILE.read_text(encoding="utf-8")
    html = html if keys else html.replace('<div id="keybox">', '<div id="keybox" hidden>')
    headers = {
        "Content-Security-Policy": policy(html), "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }  # fmt: skip

    @app.get("/", include_in_schema=False)
    async def search_page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)
