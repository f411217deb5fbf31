"""The reference page and `freshrec list`: each name and each option has one sentence of its own."""

import json

import pytest
from names import names_file, options_of
from reference import field_comments, option_classes, option_sentences, reference_page
from test_language import MAX_WORDS, n_words

from freshrec.cli.app import describe_names, main
from freshrec.models import MODEL_TABLE, MODELS
from freshrec.strategies import STRATEGIES, STRATEGY_TABLE

TERMINAL_WIDTH = 100
SENTENCES = {
    "models": {name: sentence for name, (_, sentence) in MODEL_TABLE.items()},
    "strategies": {name: sentence for name, (_, sentence) in STRATEGY_TABLE.items()},
}


def is_plain_sentence(text: str) -> bool:
    """Whether a text starts with a capital, a digit or code, ends with a period, and is short enough."""
    return (
        bool(text) and (text[0].isupper() or not text[0].isalpha()) and text[-1] == "." and n_words(text) <= MAX_WORDS
    )


def test_every_model_and_every_strategy_has_its_sentence_in_the_table() -> None:
    assert list(SENTENCES["models"]) == list(MODELS)
    assert list(SENTENCES["strategies"]) == list(STRATEGIES)


@pytest.mark.parametrize("kind", SENTENCES)
def test_every_name_has_a_plain_sentence_that_no_other_name_has(kind: str) -> None:
    sentences = SENTENCES[kind]
    assert {name: text for name, text in sentences.items() if not is_plain_sentence(text)} == {}
    assert len(set(sentences.values())) == len(sentences)


@pytest.mark.parametrize("kind", SENTENCES)
def test_the_list_on_a_terminal_is_a_line_of_at_most_100_columns_for_each_name(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["list", kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(json.loads(names_file())[kind])
    assert max(map(len, lines)) <= TERMINAL_WIDTH


def test_a_narrow_terminal_gets_lines_that_continue_below_the_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["list", "worlds"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40
    # the longest name, checkerboard, has 12 letters: sentences start in column 14, and so do their other lines
    assert {line[:14].strip() for line in lines} == {"", *describe_names("worlds")}


def test_a_variant_differs_from_its_family_by_its_sentence_and_its_options() -> None:
    page = reference_page()
    for name in ("imsr-dir", "sml-s", "er-herding", "stan"):
        table = MODEL_TABLE | STRATEGY_TABLE
        instance, sentence = table[name]
        assert f"- `{name}`: {sentence} (`{':'.join(options_of(instance))}`)" in page.splitlines()


@pytest.mark.parametrize("kind", option_classes(), ids=lambda kind: kind.__name__)
def test_every_option_has_a_plain_sentence(kind: type) -> None:
    assert {name: text for name, text in option_sentences(kind).items() if not is_plain_sentence(text)} == {}


def test_options_of_all_parts_are_in_the_reference() -> None:
    # transfer networks too, although the default instance has only one of the three
    names = {kind.__name__ for kind in option_classes()}
    assert names >= {"FitConfig", "Retainer", "Detector", "Trimmer", "InterestBudget", "Distill", "GateLimits"}
    assert names >= {"LinearTransfer", "MLPTransfer", "CNNTransfer", "InterestSpec", "SplitConfig"}
    page = reference_page()
    assert all(page.count(f"\n### {name}\n") == 1 for name in names)


def test_the_comment_of_an_option_may_stand_on_any_of_its_lines() -> None:
    source = """class Documented:
    bare: int = 1
    short: int = 2  # Number of things.
    long: int = (
        3  # Number of other things.
    )
"""
    expected = {"bare": "", "short": "Number of things.", "long": "Number of other things."}
    assert {name: text for _, name, text in field_comments(source)} == expected
