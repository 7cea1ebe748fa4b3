"""Check the contents of the source archive and its metadata."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]


def test_source_archive_contains_every_file_that_tests_read() -> None:
    read = {
        name
        for test in (ROOT / "tests").rglob("*.py")
        for name in re.findall(
            r"[\"/]((?:Makefile|Dockerfile|docker-compose[\w.]*yml|CHANGELOG\.md))\"", test.read_text()
        )
    }
    assert {"Makefile", "Dockerfile", "docker-compose.yml"} <= read
    assert read <= set(SOURCES)
    assert [name for name in SOURCES if not (ROOT / name).exists()] == []


def test_image_uses_a_python_version_named_in_the_classifiers() -> None:
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    named = [each.rpartition(" ")[2] for each in PROJECT["project"]["classifiers"] if ":: 3." in each]
    assert named[0] == least
    [image] = set(re.findall(r"^FROM python:([\d.]+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert image in named
