"""The table of routes: complete, and in the docs."""

from __future__ import annotations

from pathlib import Path

from pkbrokers_redis.web.registry import NAMES, routes

ROOT = Path(__file__).resolve().parents[2]


def test_each_route_is_in_the_docs_and_each_file_in_the_table() -> None:
    text = (ROOT / "docs" / "web.md").read_text(encoding="utf-8")
    for route in routes():
        assert f"`{route.path.replace(':.+', '')}" in text, route.path
    files = {path.stem for path in (ROOT / "pkbrokers_redis/web/routes").glob("[a-z]*.py")}
    assert files == set(NAMES)
