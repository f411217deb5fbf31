"""The documentation says what is there: short README, true file map, no link or path that leads nowhere."""

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from freshrec.cli.app import main
from freshrec.data.synthetic import make_world
from freshrec.errors import FreshrecError
from freshrec.recommender.recommender import Recommender

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
OUTSIDE = ("../shared/", "http://", "https://", "#", "mailto:")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds the logs of which the README speaks, in which we are."""
    log = make_world("drift", users=100, items=60, events=3000).log.frame
    log = log.select(user_id=pl.format("u{}", "user_id"), item_id=pl.format("i{}", "item_id"), timestamp="time")
    log[:2600].write_parquet(tmp_path / "events.parquet")
    log[2600:].write_parquet(tmp_path / "last-night.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_of_the_readme_runs(shop: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [code] = [block for block in blocks if "import" in block]
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    best = names["recommender"].recommend(["u42"], k=10)
    assert len(best) == 10 and Recommender.load("mine").recommend(["u42"], k=10).equals(best)


def test_the_commands_of_the_readme_that_keep_a_store_run(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = re.findall(
        r"^\.venv/bin/freshrec (.*--store shop.*|validate .*)$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    commands = [shlex.split(line, comments=True) for line in lines if not line.startswith("serve ")]  # never ends
    assert {command[0] for command in commands} == {"validate", "fit", "update", "recommend", "rollback"}
    for command in commands:
        assert main(command) == 0, capsys.readouterr()


def test_every_exit_code_is_documented() -> None:
    kinds, page = [FreshrecError], (ROOT / "docs" / "operations.md").read_text()
    for kind in kinds:
        kinds += kind.__subclasses__()
    codes = {0, 130, *(kind.exit_code for kind in kinds)}
    assert codes == {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}


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
    there = {path.name for path in (ROOT / "src/freshrec").rglob("*.py")} - {"__init__.py", "__main__.py"}
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


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_what_a_benchmark_imports_of_the_library_is_there(script: Path) -> None:
    # they run for minutes or hours, so that no test runs them
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("freshrec."):
            names = vars(importlib.import_module(str(node.module)))
            assert not {alias.name for alias in node.names} - names.keys()
