"""The documentation matches the code: README, packages, file map, walks, links and paths."""

import ast
import importlib
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from test_house import LAYERS, ROOT, SRC, imports

from freshrec.cli.app import main
from freshrec.data.synthetic import make_world
from freshrec.errors import FreshrecError
from freshrec.recommender.lists import UNKNOWN_USER
from freshrec.recommender.recommender import Recommender
from freshrec.replay.recipe_schema import Recipe
from freshrec.replay.recipes import make_cells

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
HISTORY = ("CHANGELOG.md", "diary.md", "016-packages-and-names.md")  # they name files that no longer exist
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
OUTSIDE = ("../shared/", "http://", "https://", "#", "mailto:")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which holds the logs that the README names."""
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
    commands = [
        shlex.split(line, comments=True) for line in lines if not line.startswith("serve ")
    ]  # runs until it is stopped
    assert {command[0] for command in commands} == {"validate", "fit", "update", "recommend", "rollback"}
    for command in commands:
        assert main(command) == 0, capsys.readouterr()


def test_the_replays_of_the_readme_are_valid_and_include_the_default_model(
    shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = re.findall(r"^\.venv/bin/freshrec (replay .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    recipes: list[Recipe] = []
    monkeypatch.setattr("freshrec.cli.replay._show_plan", recipes.append)
    monkeypatch.setattr("freshrec.cli.replay.run_recipe", lambda recipe, *_: recipes.append(recipe))
    assert [main(shlex.split(line, comments=True)) for line in lines] == [0, 0]
    for recipe in recipes:
        assert ("blend", "refit") in {(cell.model_name, cell.strategy_name) for cell in make_cells(recipe)}


def test_the_readme_gives_no_number_of_models_or_strategies() -> None:
    assert not re.search(r"\d+ (models|strategies)", (ROOT / "README.md").read_text())


def test_the_help_of_export_names_the_models_that_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "ONNX needs a model with vectors (exit code 5)." in text


def test_the_glossary_names_a_fallback_as_lists_print_it() -> None:
    row = next(line for line in (ROOT / "docs/glossary.md").read_text().splitlines() if line.startswith("| fallback |"))
    assert re.findall("`(.*?)`", row) == [UNKNOWN_USER]


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


def test_the_readme_links_the_file_map_and_names_only_files_that_are_there() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "(docs/architecture.md)" in readme
    named = set(re.findall(r"\b\w+\.py\b", readme))
    folders = ("src", "tests", "docs", "benchmarks")
    assert named - {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")} == set()


def section(name: str) -> list[str]:
    """The lines of docs/architecture.md between <!-- name --> and <!-- /name -->."""
    return ARCHITECTURE.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0].splitlines()


def test_the_drawn_packages_are_the_layers_from_top_to_bottom_with_their_real_imports() -> None:
    drawn: list[tuple[str, int]] = []
    imported: dict[str, set[str]] = {}
    for line in section("packages")[2:-1]:  # without the fences and the heading
        words = re.split(" {2,}", line.strip())
        if words[0].isdigit():
            layer = int(words.pop(0))
        if words[0] and words[0] not in "│▼":
            drawn += [(name, layer) for name in words[0].split()]
            imported[words[0]] = set(words[2].split()) if len(words) > 2 else set()
    assert [layer for _, layer in drawn] == sorted((layer for _, layer in drawn), reverse=True)
    assert dict(drawn) == LAYERS and len(drawn) == len(LAYERS)
    real: dict[str, set[str]] = {package: set() for package, layer in LAYERS.items() if layer}
    for file in SRC.rglob("*.py"):
        path = file.relative_to(SRC).as_posix()
        package = path.partition("/")[0].removesuffix(".py")
        real.get(package, set()).update(
            other for _, other in imports(path, ast.parse(file.read_text())) if other != package
        )
    assert {package: imported[package] for package in real} == {
        package: others & real.keys() for package, others in real.items()
    }


def is_empty(file: Path) -> bool:
    """Whether a Python file holds at most a docstring."""
    return all(isinstance(node, ast.Expr) for node in ast.parse(file.read_text()).body)


def test_the_file_map_holds_every_file_of_the_library_once() -> None:
    mapped, folder = [], ""
    for line in section("map"):
        if line.startswith("### "):
            folder = line.removeprefix("### ")
        elif line:
            entry = re.match(r"- `([^`]+)`: \S", line)
            assert entry, line
            mapped.append(f"{folder}/{entry[1]}")
    files = [path for path in SRC.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    there = [path for path in files if not (path.name == "__init__.py" and is_empty(path))]
    assert sorted(mapped) == sorted(path.relative_to(ROOT).as_posix() for path in there)


@cache
def syntax_tree(file: Path) -> ast.AST | None:
    return ast.parse(file.read_text()) if file.exists() else None


def definition(path: str, name: str | None) -> ast.AST | None:
    """The function, class, method or variable of this name in a file; the file if `name` is None; None if missing."""
    found = syntax_tree((ROOT if path.startswith(("docs/", "tests/")) else SRC) / path)
    for part in name.split(".") if name else []:
        found = next((node for node in vars(found).get("body", []) if part in defined_names(node)), None)
        if found is None:
            return None
    return found


def defined_names(node: ast.stmt) -> list[str]:
    match node:
        case ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name):
            return [name]
        case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
            return [part.id for part in ast.walk(target) if isinstance(part, ast.Name)]
    return []


def test_every_file_and_function_that_the_architecture_names_exists() -> None:
    text = re.sub(
        r"^- `[^`]+`", "-", ARCHITECTURE, flags=re.MULTILINE
    )  # entries of the map are relative to their headings
    named = re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", text)
    assert len(named) > 100
    assert [f"{path}: {name}" for path, name in named if definition(path, name or None) is None] == []


def uses(node: ast.AST, name: str) -> list[int]:
    """The lines on which a function or class uses a name."""
    found = [part for part in ast.walk(node) if isinstance(part, ast.Name | ast.Attribute)]
    return sorted(part.lineno for part in found if name == (part.id if isinstance(part, ast.Name) else part.attr))


def walks(text: str) -> list[str]:
    """Errors in the steps of walks: the step above must use an indented step, in the order of lines."""
    wrong: list[str] = []
    above: list[tuple[int, str, ast.AST, int]] = []  # indent, step, its object, the line of its last sub-step
    for indent, path, name in re.findall(r"^( *)\d+\. `([\w/]+\.py): ([\w.]+)`", text, re.MULTILINE):
        while above and above[-1][0] >= len(indent):
            above.pop()
        node, step = definition(path, name), f"{path}: {name}"
        assert node is not None, step
        if above:
            depth, parent, caller, line = above[-1]
            lines = [at for at in uses(caller, name.rpartition(".")[2]) if at >= line]
            wrong += [] if lines else [f"{parent} does not use {step}, or not after the step before it"]
            above[-1] = (depth, parent, caller, lines[0] if lines else line)
        above.append((len(indent), step, node, 0))
    return wrong


def test_each_step_of_a_walk_is_called_by_the_step_above_it_in_this_order() -> None:
    # fine-tuning first copies the model and then trains, and no other function does
    calls = "1. `strategies/baselines.py: FineTune.update`\n   1. `learn/fit.py: {}`\n   2. `learn/fit.py: {}`\n"
    assert walks(calls.format("grown_copy", "fit_model")) == []
    assert len(walks(calls.format("fit_model", "grown_copy"))) == 1
    assert len(walks(calls.format("grown_copy", "choose_epochs"))) == 1
    assert len(re.findall(r"^### \d\.", ARCHITECTURE, re.MULTILINE)) == 6
    assert walks(ARCHITECTURE) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_every_package_and_file_that_a_page_names_exists(page: Path) -> None:
    packages = "|".join(name for name in LAYERS if (SRC / name).is_dir())
    paths = re.findall(rf"`((?:{packages})/[\w/]+\.py)\b", page.read_text())
    assert [path for path in paths if not (SRC / path).exists()] == []


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
def test_everything_that_a_benchmark_imports_exists(script: Path) -> None:
    # benchmarks run for minutes or hours, so no test runs them
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("freshrec."):
            names = vars(importlib.import_module(str(node.module)))
            assert not {alias.name for alias in node.names} - names.keys()
