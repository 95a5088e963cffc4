"""README and docs point at files and headings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "gna_compile/**/*.md", "tests/ptx/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE_LOCATION = re.compile(
    r"`((?:gna_compile|csrc|tests|benchmarks|docs|examples|policies)/[\w./<>*-]*)`"
)
# What stands for several files, or for one to be made.
MADE = re.compile(r"[*<>]|smXX|NAME")


def prose(page: str) -> str:
    return FENCE.sub("", (ROOT / page).read_text())


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_code_locations_exist(page: str) -> None:
    for place in CODE_LOCATION.findall(prose(page)):
        assert MADE.search(place) or (ROOT / place).exists(), place


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


def test_the_makefiles_targets_are_documented() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    text = "".join((ROOT / page).read_text() for page in ("README.md", "CONTRIBUTING.md"))
    for target in set(targets.split()) - {"clean", "compiler"}:
        assert f"make {target}" in text, target
