"""Everything that a person reads is plain professional English: short sentences, and no words of a private dialect.

`python tests/test_language.py PATH...` prints what is wrong in some files or folders; without a path, in all of them.
What is read: docstrings, comments and messages of the code, help texts, pages of the server, and every document.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_WORDS = 30

# Words and phrases that a native engineer would not have written here, each with what to write instead.
DIALECT = {
    r"\banew\b": "again",
    r"\balike\b": "the same, or similar",
    r"\bbegun\b": "started, new",
    r"\btaught\b": "trained",
    r"\b(?:un)?heard\b": "read, or received",
    r"\b(?:is|are|was|were|been|not|be) told\b": "reported, or given",
    r"\bunless told otherwise\b": "by default",
    r"\bnevertheless\b": "anyway, or by force",
    r"\bof which\b": "a sentence of its own",
    r"\b(?:of|if|for|every|the latest|latest) so many\b": "the number, as in `at most k items`",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\bdear(?:er|est)?\b": "expensive",
    r"\bknobs?\b": "options",
    r"\blately\b": "recently",
    r"\bshelf\b": "the name of the structure",
    r"\bin one go\b": "in one batch, or at once",
    r"\bnobody (?:is|was|waits|asks|asked)\b": "a subject that exists",
    r"\basks nobody\b": "skips the gate",
    r"\bspeaks? (?:for|against)\b": "supports, is evidence against",
    r"\bpuzzled users\b": "users with high puzzlement",
    r"\bin our hands\b": "in our experiments",
    r"\b(?:models?|ones?|strateg(?:y|ies)|words?) of (?:one's|their|its|your) own\b": "your own model, a custom model",
    r"\bgive[sn]? up (?:the )?(?:files|versions)\b": "delete",
    r"\bwere given up\b": "were deleted",
    r"\bof (?:a|the) sort\b": "such",
    r"\bwithout a clock\b": "without timestamps",
    r"\bthe latest so\b": "the most recent N",
    r"\bas it comes\b": "with default options",
    r"\bdoes so\b": "the verb itself",
    r"\b(?:models?|experts?) that counts?\b": "counting model",
    r"\bwhat counts\b": "counting models",
    r"\bhow it bore\b": "latency and errors",
    r"\bleaves? aside\b": "ignores",
    r"\bby hand or\b": "manually or",
    r"\bsays of\b": "reports about",
    r"\bthe very\b": "the same",
    r"\blearnt\b": "learned",
}
# Sentences that may be longer: the text of others, or a list whose parts are read one by one. Each starts like this.
LONG_SENTENCES: tuple[str, ...] = ()
# Files and folders whose text is recorded, or that hold these words on purpose.
UNREAD = ("tests/test_language.py", "tests/gold/")

WORD = re.compile(r"[A-Za-z0-9]")
END = re.compile(r"(?<=[.!?])[\"')\]*_`]*\s+(?=[\"'(*_`]*[A-Z0-9`\[])")
CLOSED = re.compile(r"\be\.g\.|\bi\.e\.|\betc\.|\bcf\.|\bvs\.|\bsec\.|\beq\.|\bTab\.|\bFig\.|\bal\.")


class Text(NamedTuple):
    """A passage that is read as a whole, and where it begins."""

    line: int
    text: str


class Problem(NamedTuple):
    """What is wrong, and where."""

    path: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


def sentences(text: str) -> list[str]:
    """The sentences of a passage; a blank line, a bullet, a table cell and an indented line end one."""
    found = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-*] |\s*\d+\. |\s{4,})|\n(?=\|)|\|", text):
        plain = CLOSED.sub(lambda match: match.group().replace(".", ""), " ".join(paragraph.split()))
        found += [sentence for sentence in END.split(plain) if WORD.search(sentence)]
    return found


def n_words(sentence: str) -> int:
    """The words of a sentence; a link counts by its text, a piece of code and a formula as one word."""
    sentence = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", sentence))
    return sum(1 for word in sentence.split() if WORD.search(word))


def texts_of_markdown(source: str) -> Iterator[Text]:
    """The paragraphs, bullets and table cells of a document, without its code blocks."""
    source = re.sub(r"^( *)(```|~~~).*?^\1\2", lambda m: "\n" * m.group().count("\n"), source, flags=re.M | re.S)
    source = re.sub(r"<!--.*?-->", lambda m: "\n" * m.group().count("\n"), source, flags=re.S)
    line = 1
    for passage in re.split(r"(\n\s*\n|\n(?=\s*[-*] |\s*\d+\. |#|\|))", source):
        if passage.strip() and not re.fullmatch(r"[\s|:-]+", passage):
            yield Text(line + len(passage) - len(passage.lstrip("\n")), passage.lstrip("# "))
        line += passage.count("\n")


def texts_of_python(source: str) -> Iterator[Text]:
    """The docstrings, messages and comments of a module; neighbouring comment lines are one passage."""
    inside: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            inside.update(id(part) for part in ast.walk(node) if part is not node)
            if id(node) not in inside:
                parts = (p.value if isinstance(p, ast.Constant) else "X" for p in node.values)
                yield Text(node.lineno, "".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield from [Text(node.lineno, node.value)] * (" " in node.value.strip())
    comment, start, last = "", 0, -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(fmt|noqa|type|pragma)\b|#!", token.string):
            whole_line = not token.line[: token.start[1]].strip()
            if comment and not (whole_line and token.start[0] == last + 1):
                yield Text(start, comment)
                comment = ""
            start = start if comment else token.start[0]
            comment += "\n" * bool(comment) + token.string.lstrip("#").strip()
            last = token.start[0] if whole_line else -1
    if comment:
        yield Text(start, comment)


def texts_of_page(source: str) -> Iterator[Text]:
    """The text between the tags of a page, and the titles and placeholders."""
    for number, line in enumerate(source.splitlines(), 1):
        for text in re.findall(r">([^<>]+)<|(?:title|placeholder|aria-label)=\"([^\"]+)\"", line):
            yield Text(number, " ".join(text))


def texts_of_script(source: str) -> Iterator[Text]:
    """The comments and strings of a script or a configuration file."""
    for number, line in enumerate(source.splitlines(), 1):
        for comment, *strings in re.findall(r"(?:^|\s)(?://|#)\s(.*)|\"([^\"]* [^\"]*)\"|`([^`]* [^`]*)`", line):
            yield from (Text(number, re.sub(r"\$\{[^}]*\}", "X", text)) for text in [comment, *strings] if text)


READERS = {
    ".md": texts_of_markdown,
    ".py": texts_of_python,
    ".html": texts_of_page,
    ".js": texts_of_script,
    ".toml": texts_of_script,
}


def problems_of(path: str, source: str) -> Iterator[Problem]:
    """Sentences of more than 30 words, and words of the dialect, in one file."""
    for line, text in READERS[Path(path).suffix](source):
        for sentence in sentences(text):
            if (n := n_words(sentence)) > MAX_WORDS and not sentence.startswith(LONG_SENTENCES or ("\0",)):
                yield Problem(path, line, f"{n} words in one sentence: {sentence[:160]}")
            for pattern, better in DIALECT.items():
                if match := re.search(pattern, re.sub(r"`[^`]*`", "", sentence), flags=re.IGNORECASE):
                    yield Problem(path, line, f'"{match.group()}" is dialect; write {better}: {sentence[:160]}')


def files_below(folder: Path) -> list[Path]:
    """The files that are read, below a folder, or the file itself."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    kept = [path for path in files if path.suffix in READERS and path.is_file()]
    return [path for path in kept if not path.relative_to(ROOT).as_posix().startswith(UNREAD)]


READ = [ROOT / name for name in ("src", "docs", "recipes", "benchmarks", "tests", "README.md", "CONTRIBUTING.md",
                                 "CHANGELOG.md")]  # fmt: skip


def all_problems(places: list[Path]) -> list[Problem]:
    """The problems of all files at or below some places."""
    files = [path for place in places for path in files_below(place)]
    return [
        problem for path in files for problem in problems_of(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))
    ]


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("a.md", "One. Then " + "word " * 30 + "end.", ["32 words in one sentence"]),
        ("a.md", "- " + "word " * 20 + "\n- " + "word " * 20, []),  # bullets are sentences of their own
        ("a.md", "| " + "word " * 20 + "| " + "word " * 20 + "|", []),  # and so are cells
        ("a.md", "```\n" + "word " * 40 + "\n```", []),  # code is not text
        ("a.md", "[" + "word " * 20 + "](a link counts by its text, not by its address) " + "word " * 9, []),
        ("a.py", "def f():\n    '''" + "word " * 31 + "'''", ["31 words in one sentence"]),
        ("a.py", "raise E(f'" + "word " * 16 + "{x} ' '" + "word " * 16 + "')", ["33 words in one sentence"]),
        ("a.py", "# " + "word " * 16 + "\n# " + "word " * 16, ["32 words in one sentence"]),  # one comment, two lines
        ("a.py", "x = 1  # " + "word " * 16 + "\ny = 1  # " + "word " * 16, []),  # two comments
        ("a.py", "raise E('version 3 is set anew')", ['"anew" is dialect']),
        ("a.html", "<p>Both are alike.</p>", ['"alike" is dialect']),
        ("a.js", "// It goes live nevertheless.", ['"nevertheless" is dialect']),
        ("a.toml", "x = 1  # " + "word " * 31, ["31 words in one sentence"]),
    ],
)
def test_long_sentences_and_dialect_are_found(path: str, source: str, expected: list[str]) -> None:
    found = [problem.what for problem in problems_of(path, source)]
    assert [what.partition(";")[0].partition(":")[0] for what in found] == expected


@pytest.mark.parametrize("place", READ, ids=lambda place: place.name)
def test_every_text_is_plain_english_in_sentences_of_at_most_30_words(place: Path) -> None:
    assert [str(problem) for problem in all_problems([place])] == []


def test_every_exception_to_the_length_of_sentences_is_still_needed() -> None:
    texts = [(path.suffix, path.read_text("utf-8")) for place in READ for path in files_below(place)]
    read = [sentence for kind, text in texts for passage in READERS[kind](text) for sentence in sentences(passage.text)]
    for beginning in LONG_SENTENCES:
        assert any(n_words(sentence) > MAX_WORDS for sentence in read if sentence.startswith(beginning)), beginning


def main() -> None:
    """Print the problems of the files and folders that are named."""
    found = all_problems([Path(name).resolve() for name in sys.argv[1:]] or READ)
    sys.stdout.write("".join(f"{line}\n" for line in [*found, f"{len(found)} problems"]))


if __name__ == "__main__":
    main()
