"""The code follows the ten rules of CONTRIBUTING.md. The checks read the syntax trees of src/freshrec.

A check yields (line, what is wrong and what to do) for each place that breaks its rule. Each check
is tested twice: it must find a bad example, and it must find nothing in src/freshrec.
"""

import ast
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import generate
import pytest

import freshrec

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "freshrec"

# A place (a folder or a file of src/freshrec) may import places with a smaller number.
# Two folders with the same number do not import each other; two files with the same number may.
LAYERS = {
    "types": 0, "errors": 0, "version": 0, "device": 0, "config": 0, "deprecation": 0, "disk_names": 0, "files": 0,
    "forks": 0, "former_names": 0, "memory_limits": 0, "progress": 0, "random_streams": 0, "text_layout": 0,
    "user_modules": 0,
    "data": 1,
    "nn": 2,
    "models": 3,
    "learn": 4,
    "strategies": 5, "store": 5,
    "replay": 6,
    "recommender": 7,
    "nightly": 8, "server": 8,
    "cli": 9,
    "__init__": 10, "__main__": 10,
}  # fmt: skip

MAX_FILE, MAX_FUNCTION, MAX_METHODS = 400, 60, 12

BASES = {"Module", "Function", "Protocol", "Enum", "StrEnum", "IntEnum", "NamedTuple", "BaseModel"}

INSTEAD = {  # of calling ...
    "hasattr": "ask for a protocol of types.py, or make it a field",
    "eval": "use a dict of names",
    "exec": "use a dict of names",
    "torch.save": "use safetensors",
    "torch.load": "use safetensors",
}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

# The public names of the package. A new one is a promise: add it here, to the README and to the changelog.
PUBLIC: list[str] = [
    "BusyError",
    "FreshrecError",
    "IncompatibleError",
    "LogError",
    "MODELS",
    "OptionError",
    "Recommender",
    "RefusedError",
    "STRATEGIES",
    "SpanError",
    "SplitConfig",
    "StateError",
    "TrainingError",
    "__version__",
    "make_world",
    "read_log",
    "split_log",
]

Wrong = Iterator[tuple[int, str]]
Check = Callable[[str, ast.Module, str], Wrong]  # (path below src/freshrec, its tree, its source)


def check_layers(path: str, tree: ast.Module, source: str) -> Wrong:
    """Rule 4: imports point down."""
    own = path.partition("/")[0].removesuffix(".py")
    if own not in LAYERS:
        yield 1, f'"{own}" has no layer; give it one in LAYERS of tests/test_house.py, or move the file'
        return
    for line, other in imports(path, tree):
        if other == "":
            yield line, "imports the package itself; import from the file that defines the name"
        elif LAYERS[other] > LAYERS[own]:
            above = f"{own} (L{LAYERS[own]}) imports {other} (L{LAYERS[other]}), which is above it"
            yield line, f"{above}; take the thing as an argument, or move it down"
        elif LAYERS[other] == LAYERS[own] and other != own and "/" in path:
            yield line, f"{own} imports {other}, a folder of the same layer; move what both need to a layer below"


def imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines and modules of freshrec that a file imports anywhere. "" is the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = ["freshrec", *path.split("/")][: -node.level] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            modules = {f"freshrec.{alias.name}" for alias in node.names} if module == "freshrec" else {module}
        else:
            continue
        for module in sorted(modules):
            package, _, rest = module.partition(".")
            place = rest.partition(".")[0]
            if package == "freshrec":
                yield node.lineno, place if place in LAYERS else ""


def check_sizes(path: str, tree: ast.Module, source: str) -> Wrong:
    """Rule 5: limits on the size of files, functions and classes."""
    if (n := len(source.splitlines())) > MAX_FILE:
        yield MAX_FILE, f"{n} lines, at most {MAX_FILE}; split the file where its subject changes"
    for node in ast.walk(tree):
        if isinstance(node, generate.Function) and (n := node.end_lineno - node.lineno + 1) > MAX_FUNCTION:
            yield node.lineno, f"{node.name} has {n} lines, at most {MAX_FUNCTION}; split it into named parts"
        if isinstance(node, ast.ClassDef):
            n = sum(isinstance(item, generate.Function) for item in node.body)
            if n > MAX_METHODS:
                yield node.lineno, f"{node.name} has {n} methods, at most {MAX_METHODS}; turn some into functions"


def check_inheritance(path: str, tree: ast.Module, source: str) -> Wrong:
    """Rule 6: abstract or final. Protocols may extend protocols, and the errors of errors.py their root."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    errors = {"Exception", *(node.name for node in classes)} if path == "errors.py" else set()
    for node in classes:
        bases = [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]
        for base in bases:
            if "Protocol" not in bases and base not in BASES | errors:
                advice = "define it in errors.py" if base.endswith(("Exception", "Error")) else "hold it as a field"
                yield node.lineno, f"{node.name} inherits from {base}; {advice}"


def check_guessing(path: str, tree: ast.Module, source: str) -> Wrong:
    """Rule 8: no hasattr, no **kwargs, no bare except, no pickle, no eval."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func, args, keywords):
                name = ast.unparse(func)
                if name in INSTEAD:
                    yield node.lineno, f"calls {name}; {INSTEAD[name]}"
                if name == "getattr" and len(args) == 3:
                    yield node.lineno, f"getattr with a default is hasattr; {INSTEAD['hasattr']}"
                if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in keywords):
                    yield node.lineno, "reads pickles; use safetensors or Parquet"
            case ast.arguments(kwarg=ast.arg(arg=name, lineno=line)):
                yield line, f"**{name} swallows typos; name the parameters"
            case ast.ExceptHandler(type=caught):
                if caught is None or re.search(r"\b(Base)?Exception\b", ast.unparse(caught)):
                    yield node.lineno, "catches everything; name the errors that can happen here"
            case ast.Import(names) | ast.ImportFrom(names=names):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in names]
                for module in modules:
                    if module.partition(".")[0] in PICKLES:
                        yield node.lineno, f"imports {module}; use safetensors or Parquet"


def check_tags(path: str, tree: ast.Module, source: str) -> Wrong:
    """Rule 1, its spelling: a tag reads [PAPER eq. NUMBER] and stands once, in the docstring of a function."""
    docs = [ast.get_docstring(node) or "" for _, node in generate.functions(tree)]
    free = [f"[{paper} eq. {number}]" for doc in docs for paper, number in generate.TAG.findall(doc)]
    for line, text in enumerate(source.splitlines(), 1):
        for tag in re.findall(r"\[[^\[\]]*\beqs?\b[^\[\]]*\]", text):
            if not generate.TAG.fullmatch(tag):
                yield line, f"{tag} is not a tag; write [PAPER eq. NUMBER], one tag for each equation"
            elif tag not in free:
                yield line, f"{tag} is in no function's docstring; make the equation a function, or drop the brackets"
            else:
                free.remove(tag)


# Words that no name may contain, because a new reader cannot know what they mean here.
PRIVATE_WORDS = {
    "alike", "anew", "apart", "ask", "asked", "aside", "begun", "enough", "fading", "happened", "heard", "here",
    "joins", "kinds", "knob", "knobs", "lately", "liked", "manner", "mine", "one", "ours", "rehearsal", "rehearsals",
    "rehearsed", "said", "say", "settle", "settled", "shelf", "taken", "taught", "tell", "theirs", "there", "thing",
    "things", "told", "wanted", "way", "ways", "what", "which", "who", "whose", "why",
}  # fmt: skip
# Names in files, HTTP answers or options. They cannot change without an alias.
PUBLISHED_NAMES = {
    "TAKEN_SUFFIX", "mark_taken",  # the ending of a journal's file
    "asked",  # a number of `freshrec bench serve --json`
    "fading", "kinds_R", "log_fading", "taken", "taken_BTD",  # weights in checkpoints
    "why",  # of a click and of a search, in HTTP answers
    "KINDS", "LISTED_KINDS",  # of versions, and of what `freshrec list` lists
}  # fmt: skip


def check_names(path: str, tree: ast.Module, source: str) -> Wrong:
    """A name consists of standard terms of the field."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                pass
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                pass
            case _:
                continue
        parts = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().split("_")
        if name not in PUBLISHED_NAMES and (private := PRIVATE_WORDS & set(parts)):
            yield node.lineno, f'"{name}" says "{min(private)}"; take the term that papers and libraries use'


BAD = [
    (check_names, "types.py", "def told(): ...", '"told" says "told"'),
    (check_names, "types.py", "class Asked: ...", '"Asked" says "asked"'),
    (check_names, "types.py", "class WhatHappened: ...", '"WhatHappened" says "happened"'),
    (check_names, "types.py", "def f(n_wanted): ...", '"n_wanted" says "wanted"'),
    (check_names, "types.py", "self.said_BN = x", '"said_BN" says "said"'),
    (check_names, "types.py", "for one in x: ...", '"one" says "one"'),
    (check_layers, "data/log.py", "from freshrec.models.mf import MF", "which is above it"),
    (check_layers, "data/log.py", "def f():\n    import freshrec.cli.app", "which is above it"),
    (check_layers, "data/log.py", "from ..models import mf", "which is above it"),
    (check_layers, "data/log.py", "from freshrec import learn", "which is above it"),
    (check_layers, "server/app.py", "from freshrec.nightly import gate", "same layer"),
    (check_layers, "cli/app.py", "from freshrec import Recommender", "the package itself"),
    (check_layers, "utils.py", "", "has no layer"),
    (check_sizes, "types.py", "x = 1\n" * 401, "401 lines"),
    (check_sizes, "types.py", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
    (check_sizes, "types.py", "class A:\n" + "".join(f"    def m{i}(self): ...\n" for i in range(13)), "13 methods"),
    (check_inheritance, "types.py", "class A(B): ...", "A inherits from B"),
    (check_inheritance, "types.py", "class A(ValueError): ...", "define it in errors.py"),
    (check_guessing, "types.py", "hasattr(x, 'y')", "calls hasattr"),
    (check_guessing, "types.py", "getattr(x, 'y', None)", "getattr with a default"),
    (check_guessing, "types.py", "def f(**options): ...", "**options"),
    (check_guessing, "types.py", "try: x\nexcept: y", "catches everything"),
    (check_guessing, "types.py", "try: x\nexcept (KeyError, Exception): y", "catches everything"),
    (check_guessing, "types.py", "from pickle import loads", "imports pickle"),
    (check_guessing, "types.py", "import torch, joblib.memory", "imports joblib.memory"),
    (check_guessing, "types.py", "torch.load(path)", "calls torch.load"),
    (check_guessing, "types.py", "np.load(path, allow_pickle=True)", "reads pickles"),
    (check_guessing, "types.py", "eval('1')", "calls eval"),
    (check_tags, "types.py", "def f():\n    '''x [IMSR eqs. 3-5]'''", "is not a tag"),
    (check_tags, "types.py", "x = 1  # [IMSR eq. 5]", "drop the brackets"),
    (check_tags, "types.py", "def f():\n    '''x [IMSR eq. 5]'''\n    # [IMSR eq. 5]", "drop the brackets"),
]
GOOD = """
    import enum
    from typing import Protocol
    from torch import nn
    from freshrec.errors import OptionError
    from freshrec.nn.layers import squash

    class Kind(enum.Enum): ...
    class Shape(Protocol[T]): ...
    class Round(Shape, Protocol): ...

    class Net(nn.Module):
        def forward(self, x, *rest):
            '''y = x [IMSR eq. 5], not [0, 1] and not IMSR eq. 6.'''
            try:
                return self.eval()
            except KeyError as e:
                raise OptionError from e
"""
CHECKS: list[Check] = [check_layers, check_sizes, check_inheritance, check_guessing, check_tags, check_names]


@pytest.mark.parametrize(("check", "path", "source", "expected"), BAD)
def test_each_rule_finds_a_violation(check: Check, path: str, source: str, expected: str) -> None:
    ((_, found),) = check(path, ast.parse(source), source)
    assert expected in found


@pytest.mark.parametrize("check", CHECKS)
def test_no_rule_rejects_good_code(check: Check) -> None:
    source = textwrap.dedent(GOOD)
    assert list(check("models/mf.py", ast.parse(source), source)) == []


@pytest.mark.parametrize("check", CHECKS)
def test_the_code_follows_the_rule(check: Check) -> None:
    wrong = []
    for file in sorted(SRC.rglob("*.py")):
        source, path = file.read_text(), file.relative_to(SRC).as_posix()
        wrong += [f"src/freshrec/{path}:{line}: {what}" for line, what in check(path, ast.parse(source), source)]
    assert not wrong, "\n" + "\n".join(wrong)


def imported_modules(file: Path, modules: set[str]) -> set[str]:
    """The modules of freshrec that a file imports, inside functions too, but not for type checking alone."""
    found, nodes = set[str](), list[ast.AST](ast.parse(file.read_text()).body)
    while nodes:
        match nodes.pop():
            case ast.If(test=ast.Name("TYPE_CHECKING"), orelse=others):
                nodes += others
            case ast.Import(names):
                found |= {alias.name for alias in names} & modules
            case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] == "freshrec":
                inner = {f"{module}.{alias.name}" for alias in names}
                found |= inner & modules or {module}
            case node:
                nodes += ast.iter_child_nodes(node)
    return found


def circles(imports_of: dict[str, set[str]]) -> set[str]:
    """Modules that import each other in a circle: what remains when those without imports are taken away, both ways."""
    left = dict(imports_of)
    while free := {m for m, its in left.items() if not its & left.keys() or not any(m in left[o] for o in left)}:
        left = {module: its for module, its in left.items() if module not in free}
    return set(left)


def test_a_circle_of_imports_is_found() -> None:
    # c and d import each other; b imports them, they import a, and neither a nor b is part of the circle
    assert circles({"a": set(), "b": {"c"}, "c": {"d", "a"}, "d": {"c"}}) == {"c", "d"}


def test_no_file_imports_itself_by_way_of_others() -> None:
    files = {
        f"freshrec.{file.relative_to(SRC).with_suffix('').as_posix().replace('/', '.')}": file
        for file in SRC.rglob("*.py")
    }
    files = {module.removesuffix(".__init__"): file for module, file in files.items()}
    assert len(files) > 100
    assert circles({module: imported_modules(file, set(files)) for module, file in files.items()}) == set()


def check_equations(root: Path) -> Iterator[str]:
    """Rule 1: one equation of a known paper, one function, at least one test."""
    papers, homes, tests = generate.papers(root), generate.homes(root), generate.checks(root)
    tested = {(t.paper, t.number) for t in tests}
    first = {(e.paper, e.number): e for e in reversed(homes)}
    for e in [*homes, *tests]:
        if e.paper not in papers:
            yield f'{e.file}:{e.line}: no paper "{e.paper}" in docs/papers.md ({", ".join(papers)}); add it'
    for e in homes:
        tag, home = f"[{e.paper} eq. {e.number}]", first[e.paper, e.number]
        if e != home:
            yield f"{e.file}:{e.line}: {tag} lives in {home.function} ({home.file}:{home.line}) already; call that one"
        elif (e.paper, e.number) not in tested:
            yield f"{e.file}:{e.line}: {tag} has no test; compute it by hand in a test with the tag in its docstring"
    for t in tests:
        if t.paper in papers and (t.paper, t.number) not in first:
            yield f"{t.file}:{t.line}: [{t.paper} eq. {t.number}] is in no function of src/freshrec; correct the tag"


def test_an_equation_without_a_paper_a_home_or_a_test_is_found(tmp_path: Path) -> None:
    def write(path: str, *lines: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text("\n".join(lines))

    write("docs/papers.md", "# Papers", "## IMSR")
    write("src/freshrec/a.py", "def f(): '[IMSR eq. 1] [IMSR eq. 2] [LOST eq. 1]'", "def g(): '[IMSR eq. 1]'")
    # a tag of a test may stand in its docstring, in a comment inside, or in a comment right above it
    write("tests/test_a.py", "def test_f():", " '[IMSR eq. 1]'  # [IMSR eq. 3]", "# [LOST eq. 1]", "def test_g(): ...")
    assert [wrong.partition(";")[0] for wrong in check_equations(tmp_path)] == [
        'src/freshrec/a.py:1: no paper "LOST" in docs/papers.md (IMSR)',
        'tests/test_a.py:4: no paper "LOST" in docs/papers.md (IMSR)',
        "src/freshrec/a.py:1: [IMSR eq. 2] has no test",
        "src/freshrec/a.py:2: [IMSR eq. 1] lives in f (src/freshrec/a.py:1) already",
        "tests/test_a.py:1: [IMSR eq. 3] is in no function of src/freshrec",
    ]


def test_every_equation_has_one_paper_one_function_and_a_test() -> None:
    wrong = list(check_equations(ROOT))
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("page", generate.PAGES)
def test_generated_pages_are_current(page: str) -> None:
    path = ROOT / page
    current = path.exists() and path.read_text() == generate.PAGES[page](ROOT)
    assert current, f"{page} is not what the code says now; run `make docs` and commit the result"


def test_the_public_names_are_these() -> None:
    assert sorted(PUBLIC) == PUBLIC
    assert freshrec.__all__ == PUBLIC
