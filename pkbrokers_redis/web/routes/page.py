"""The page: one answer with its style and script inside, and a policy that lets nothing else run or load."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from aiohttp import web

from pkbrokers_redis.web.registry import Route
from pkbrokers_redis.web.services import Services

FOLDER = Path(__file__).resolve().parents[1] / "pages"


async def page(_: web.Request, services: Services) -> web.Response:
    """It holds no data: the script asks the API, with the token that its own URL was opened with."""
    html, policy = built_page()
    return web.Response(body=html, content_type="text/html", charset="utf-8", headers={
        "Content-Security-Policy": policy,
    })  # fmt: skip


@cache
def built_page() -> tuple[bytes, str]:
    """The page, and its Content-Security-Policy, which knows style and script by their hashes."""
    html, style, script = (
        (FOLDER / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )
    return html.replace("/*style*/", style).replace("/*script*/", script).encode(), policy


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


ROUTES = [Route("/", page, "/")]
