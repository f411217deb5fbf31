"""The documentation says what is there: short README, true file map, no link or path that leads nowhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
OUTSIDE = ("../shared/", "http://", "https://", "#", "mailto:")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_readme_is_at_most_150_lines_and_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    assert "make demo" in readme
    assert "make test" in readme


def test_the_file_map_of_the_readme_matches_the_tree() -> None:
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\b\w+\.py\b", readme)) - {"__init__.py"}
    there = {path.name for path in (ROOT / "src/freshrec").rglob("*.py")} - {"__init__.py"}
    assert there - named == set(), "files that the README's map leaves out"
    others = {path.name for folder in ("tests", "docs", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    assert named - there - others == set(), "files that the README names and that are not there"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    dead = [link for link in links if not link.startswith(OUTSIDE) and not (page.parent / link.split("#")[0]).exists()]
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_file_named_in_a_page_exists(page: Path) -> None:
    paths = re.findall(r"`((?:src|tests|docs|recipes|benchmarks)/[\w./-]+)`", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_make_target_named_in_a_page_exists(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)`", page.read_text())) <= set(targets)
