"""Writes the pages of docs/, and the list of names, that are made from the code: `make docs`.

`docs/equations.md` lists every equation of a paper, the one function that computes it, and the tests that check it.
The link is a tag such as [IMSR eq. 10] (paper key of docs/papers.md, number as printed there): in the docstring of the
function, and in the docstring or a comment of its test. tests/test_house.py keeps both ends of the link whole.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from names import names_file
from reference import reference_page
from results import operations, readme, results_page

ROOT = Path(__file__).resolve().parent.parent
TAG = re.compile(r"\[(\w+) eq\. (\w+)\]")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Tagged:
    """A tag in a function: where it stands, and what the function says of itself in its first line."""

    paper: str
    number: str
    function: str  # `fisher`, `EmbeddingTable.lookup`
    file: str  # relative to the root
    line: int
    summary: str


def papers(root: Path = ROOT) -> list[str]:
    """Keys of the papers: the second-level headings of docs/papers.md."""
    return re.findall(r"^## (\w+)", (root / "docs/papers.md").read_text(), flags=re.MULTILINE)


def functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Functions of a module and methods of its classes, with dotted names; a nested function is part of its owner."""
    for node in tree.body:
        if isinstance(node, Function):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{item.name}", item) for item in node.body if isinstance(item, Function))


def homes(root: Path = ROOT) -> list[Tagged]:
    """Equations of src/freshrec: tags in the docstrings of functions and methods."""
    found = []
    for path in sorted((root / "src/freshrec").rglob("*.py")):
        for name, node in functions(ast.parse(path.read_text())):
            found += _tagged(ast.get_docstring(node) or "", name, node, path.relative_to(root))
    return found


def checks(root: Path = ROOT) -> list[Tagged]:
    """Tests of equations: tags in the docstring or the comments of a test, or in the comment right above it."""
    found = []
    for path in sorted((root / "tests").rglob("test_*.py")):
        source = path.read_text()
        comments = _comments(source)
        for name, node in functions(ast.parse(source)):
            if name.rpartition(".")[2].startswith("test_"):
                lines = _lines_of(source, node)
                own = [comment for line, comment in comments if line in lines]
                text = "\n".join([ast.get_docstring(node) or "", *own])
                found += _tagged(text, name, node, path.relative_to(root))
    return found


def _comments(source: str) -> list[tuple[int, str]]:
    """Line and text of every comment of a file; a "#" in a string is no comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def _lines_of(source: str, node: Function) -> range:
    """Line numbers of a function, with its decorators and the comments right above them."""
    lines = source.splitlines()
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    while first > 1 and lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return range(first, (node.end_lineno or first) + 1)


def _tagged(text: str, name: str, node: Function, file: Path) -> list[Tagged]:
    summary = TAG.sub("", (ast.get_docstring(node) or "").partition("\n")[0]).strip().removesuffix(" .")
    tags = dict.fromkeys(TAG.findall(text))  # each once, in the order of the text
    return [Tagged(paper, number, name, file.as_posix(), node.lineno, summary) for paper, number in tags]


def equations_page(root: Path = ROOT) -> str:
    """The text of docs/equations.md: one row per equation, by paper, then by number."""
    tests: dict[tuple[str, str], list[str]] = {}
    for check in checks(root):
        tests.setdefault((check.paper, check.number), []).append(f"[{check.function}](../{check.file})")
    order = {paper: i for i, paper in enumerate(papers(root))}
    rows = [
        f"| {e.paper} | {e.number} | [{e.function}](../{e.file}) | {_cell(e.summary)} "
        f"| {', '.join(tests.get((e.paper, e.number), []))} |"
        for e in sorted(homes(root), key=lambda e: (order.get(e.paper, len(order)), _number(e.number), e.file, e.line))
    ]
    head = [
        "# Equations",
        "",
        "Written by `make docs` from the tags in the code; do not edit. Papers: [papers.md](papers.md).",
        'To find one: `grep -rn "IMSR eq. 10" src tests`.',
        "",
        "| paper | eq. | function | computes | tests |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _number(number: str) -> tuple[int, str]:
    """Sorts 2 before 10, and 10 before 10a."""
    digits = re.match(r"\d*", number)
    return (int(digits.group()) if digits and digits.group() else 0, number)


# Every generated page: path relative to the root -> what it should say. Each is computed when it is asked for.
PAGES: dict[str, Callable[[Path], str]] = {
    "README.md": readme,
    "docs/operations.md": operations,
    "docs/equations.md": equations_page,
    "docs/reference.md": reference_page,
    "docs/results.md": results_page,
    "src/freshrec/names.json": lambda root: names_file(),
}


if __name__ == "__main__":
    for page, text_of in PAGES.items():
        (ROOT / page).write_text(text_of(ROOT))
        print(f"wrote {page}")
