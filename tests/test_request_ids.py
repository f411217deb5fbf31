"""Ids of requests: a look-up never guesses, every id can be asked for, and no answer holds a number that is rounded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jsonschema_rs
import numpy as np
import polars as pl
import pytest
import torch
from serving import TOKEN, server
from starlette.testclient import TestClient
from typer.main import get_command

from freshrec.cli.app import app, main
from freshrec.cli.id_arguments import parse_ids, separate_ids
from freshrec.cli.server import erase_in_subprocess
from freshrec.errors import FreshrecError, LogError, OptionError
from freshrec.recommender.list_request import ListRequest
from freshrec.recommender.recommender import Recommender
from freshrec.server.middleware import ServerLimits

LARGE = 2**60  # JSON readers with 64-bit floats round LARGE + 1 to LARGE
SAFE = 2**53 - 1  # the largest integer that they all keep
# Each user has two of these three items.
INTEGER_USERS, INTEGER_ITEMS = (5, 7, -5, LARGE + 7), (1, LARGE + 1, LARGE + 2)
ODD = (".", "..", "a/b", "a,b", "-5", "-x", "--x", "%2E", "u?k=1", "u#1", " ", "u1 ", "user", "é" * 500, "7", "x\ty")
TEXT_ITEMS = ("i", "a,b", "..", "12")


def make_store(folder: Path, users: Any, items: Any) -> Path:
    """Make a store in `folder`/s with the model item-knn. The users have two or three of the items."""
    pairs = [(user, items[(n + i) % len(items)]) for n, user in enumerate(users) for i in range(len(items) - 1)]
    frame = pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row")
    frame = frame.with_columns(timestamp=10**9 + pl.int_range(pl.len()), category=pl.lit("12"))
    frame.write_parquet(folder / "log.parquet")
    assert main(["fit", str(folder / "log.parquet"), "--store", str(folder / "s"), "--model", "item-knn"]) == 0
    return folder


@pytest.fixture(scope="module")
def integer_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("integers"), INTEGER_USERS, INTEGER_ITEMS)


@pytest.fixture(scope="module")
def text_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("texts"), [user for user in ODD if user not in (" ", "x\ty")], TEXT_ITEMS)


@pytest.fixture(scope="module")
def integers(integer_store: Path) -> Iterator[TestClient]:
    with server(integer_store) as (client, _):
        yield client


@pytest.fixture(scope="module")
def texts(text_store: Path) -> Iterator[TestClient]:
    with server(text_store) as (client, _):
        yield client


def ids_in(answer: Any) -> list[Any]:
    """All ids of users and items in an answer, at any depth."""
    if isinstance(answer, list):
        return [found for part in answer for found in ids_in(part)]
    if not isinstance(answer, dict):
        return []
    own = [value for name, value in answer.items() if name in ("user_id", "item_id", "similar_id", "because")]
    return [value for value in own if value is not None] + ids_in(list(answer.values()))


# -- HTTP


@pytest.mark.parametrize("user", ["nobody", "05", "+8", " 5", "5.0", "1e3", "", "٥", str(2**63), "x" * 999])
def test_a_look_up_of_an_id_that_cannot_be_in_the_log_finds_nothing(user: str, integers: TestClient) -> None:
    query = {"user": user}
    if not user:  # an id is not empty
        assert integers.get("/recommend", params=query).status_code == 422
        return
    paths = [f"/recommend/{quote(user, safe='')}", "/recommend"]
    found = [integers.get(path, params=query if path == "/recommend" else None) for path in paths]
    assert [(one.status_code, one.json()["fallback"], one.json()["user_id"]) for one in found] == [
        (200, "unknown user", user)
    ] * 2
    [listed] = integers.post("/recommend", json={"users": [user]}).json()["lists"]
    assert listed["fallback"] == "unknown user" and listed["items"] == found[0].json()["items"]
    for path, parameters in (
        ("/similar", {"item": user}),
        ("/users/interests", query),
        ("/users/changes", query),
        ("/explain", {"user": user, "item": 1}),
        ("/explain", {"user": 5, "item": user}),
    ):
        assert integers.get(path, params=parameters).status_code == 404, path


def test_filters_ignore_items_that_cannot_be_in_the_log(integers: TestClient) -> None:
    everything = {"user": "5", "exclude_seen": False}

    def items(**filters: Any) -> set[Any]:
        return set(ids_in(integers.get("/recommend", params=everything | filters).json()["items"]))

    assert items(allow=["01", "x", "1"]) == items(allow=["1"]) == {1}
    assert items(allow=["x"]) == set() and items(deny=["01", "1.0"]) == items()


@pytest.mark.parametrize("user", ODD)
def test_every_id_can_be_asked_for_in_a_query(user: str, texts: TestClient) -> None:
    is_known = user not in (" ", "x\ty")  # they are in no log, and still no wrong request
    found = texts.get("/recommend", params={"user": user}).json()
    assert found["user_id"] == user and (found["fallback"] == "unknown user") == (not is_known)
    profile = texts.get("/users/interests", params={"user": user})
    assert profile.status_code == (200 if is_known else 404)
    explained = texts.get("/explain", params={"user": user, "item": ".."})
    assert explained.status_code == (200 if is_known else 404)


@pytest.mark.parametrize("item", TEXT_ITEMS)
def test_every_item_can_be_asked_for_in_a_query(item: str, texts: TestClient) -> None:
    assert texts.get("/similar", params={"item": item}).json()["item_id"] == item
    assert ids_in(texts.get("/recommend", params={"user": "new", "allow": item}).json()["items"]) == [item]


def test_a_number_beyond_2_53_leaves_as_text_and_comes_back_as_the_same_id(integers: TestClient) -> None:
    item, user = str(LARGE + 1), str(LARGE + 7)
    click = {"user_id": 5, "item_id": item, "timestamp": 1_790_000_000}
    assert integers.post("/events", json={"events": [click]}).status_code == 200
    answers = [
        integers.get("/recommend", params={"user": user, "exclude_seen": False}),
        integers.post("/recommend", json={"users": [LARGE + 7, 5], "exclude_seen": False}),
        integers.get("/similar", params={"item": item}),
        integers.get("/users/interests", params={"user": user}),
        integers.get("/explain", params={"user": user, "item": item}),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        found = ids_in(answer.json())
        assert all(isinstance(one, str) for one in found if abs(int(one)) > SAFE)
        assert {int(one) for one in found} <= {*INTEGER_USERS, *INTEGER_ITEMS}
        assert any(isinstance(one, str) for one in found)
    listed = ids_in(answers[0].json()["items"])
    assert sorted(map(type, listed), key=str) == [int, str, str]  # 1 stays a number
    for one in listed:
        assert integers.get(f"/similar/{one}").status_code == 200


CLICK_IDS: list[tuple[dict[str, Any], str | None]] = [
    ({"user_id": LARGE + 9, "item_id": 1}, "user_id is the unknown number"),
    ({"user_id": 5, "item_id": LARGE + 9}, "item_id is the unknown number"),
    ({"user_id": SAFE + 1, "item_id": 1}, "Send it as text"),
    ({"user_id": -SAFE - 1, "item_id": 1}, "Send it as text"),
    ({"user_id": 5, "item_id": 1, "event_id": LARGE}, "event_id is the unknown number"),
    ({"user_id": 5, "item_id": 1, "category": LARGE}, "category is the unknown number"),
    ({"user_id": 2**63, "item_id": 1}, "user_id"),
    ({"user_id": "05", "item_id": 1}, "Did you mean 5?"),
    ({"user_id": "nobody", "item_id": 1}, "is not an integer"),
    ({"user_id": 5.0, "item_id": 1}, "valid integer or text"),
    ({"user_id": True, "item_id": 1}, "valid integer or text"),
    ({"user_id": None, "item_id": 1}, "valid integer or text"),
    ({"user_id": [5], "item_id": 1}, "valid integer or text"),
    ({"user_id": 5, "item_id": 1, "event": "a\n"}, "control characters"),
    ({"user_id": SAFE, "item_id": -SAFE}, None),
    ({"user_id": LARGE + 7, "item_id": LARGE + 1}, None),  # both are known, so they are not rounded
    ({"user_id": str(LARGE + 9), "item_id": str(LARGE + 1), "event_id": str(LARGE)}, None),
    ({"user_id": LARGE + 9, "item_id": 1}, None),  # known from the click before
]


def test_a_click_takes_a_number_beyond_2_53_only_if_it_is_known(integer_store: Path, tmp_path: Path) -> None:
    make_store(tmp_path, INTEGER_USERS, INTEGER_ITEMS)
    with server(tmp_path) as (client, _):
        for click, problem in CLICK_IDS:
            answer = client.post("/events", json={"events": [click]})
            assert answer.status_code == (200 if problem is None else 422), (click, answer.text)
            assert problem is None or problem in answer.json()["detail"]


def test_a_number_in_a_body_is_its_text_if_the_ids_of_the_log_are_text(texts: TestClient) -> None:
    body = {"users": [7], "allow": [12], "exclude_seen": False, "category": 12}
    [found] = texts.post("/recommend", json=body).json()["lists"]
    assert found["fallback"] is None and ids_in(found["items"]) == ["12"]
    answer = texts.post("/events", json={"events": [{"user_id": LARGE, "item_id": "i"}]})
    assert answer.status_code == 422 and "Send it as text" in answer.json()["detail"]


WRONG_BODIES: list[tuple[dict[str, Any], str]] = [
    ({"users": [True]}, "valid integer or text"),
    ({"users": [[["x"]]]}, "valid integer or text"),
    ({"users": {"a": 1}}, "valid list"),
    ({"users": "5"}, "valid list"),
    ({"users": [5], "allow": [None]}, "body.allow.0: Input should be a valid integer or text."),
    ({"users": [5], "allow": list(range(1001))}, "at most 1000"),
    ({"users": [5], "deny": ["x" * 1001]}, "at most 1000"),
    ({"users": [5], "category": False}, "valid integer or text"),
    *(({"users": [5], "k": k}, "k: ") for k in (True, None, [], "x", 5.5, 1e3, -1, 2**70, 1e400)),
    *(({"users": [5], "diversity": weight}, "diversity: ") for weight in (True, None, "x", -1, 1e400)),
]


@pytest.mark.parametrize(("body", "problem"), WRONG_BODIES)
def test_a_value_of_a_wrong_type_in_a_body_is_refused(body: dict[str, Any], problem: str, integers: TestClient) -> None:
    answer = integers.post("/recommend", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 422 and problem in answer.json()["detail"], answer.text


@pytest.mark.parametrize("body", ["[" * 100_000, '{"users": [' + "9" * 5000 + "]}", '{"users": ["\\ud800"]}', "\xff"])
def test_a_body_that_cannot_be_parsed_gets_a_sentence(body: str, integers: TestClient) -> None:
    answer = integers.post("/recommend", content=body.encode("latin-1"), headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and answer.json()["detail"]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/recommend/5?kk=3", 'There is no parameter "kk". Did you mean "k"?'),
        ("/recommend/5?exclude-seen=false", 'Did you mean "exclude_seen"?'),
        ("/recommend?user=5&user=7", "user is given 2 times"),
        ("/recommend/5?k=3&k=4", "k is given 2 times"),
        ("/recommend/5?user=7", 'There is no parameter "user"'),
        ("/recommend", "user: Field required"),
        ("/explain?user=5", "item: Field required"),
        ("/similar/1?exclude_seen=true", 'There is no parameter "exclude_seen"'),
        ("/version?k=1", 'There is no parameter "k"'),
    ],
)
def test_a_parameter_that_would_be_ignored_is_refused(path: str, problem: str, integers: TestClient) -> None:
    answer = integers.get(path)
    assert answer.status_code == 422 and problem in answer.json()["detail"]


def test_lists_may_repeat_and_pages_and_probes_take_any_query(integers: TestClient) -> None:
    for path in ("/recommend/5?allow=1&allow=2&deny=3&deny=4", "/?x=1", "/page.js?v=2", "/metrics?x=1", "/docs?x=1"):
        assert integers.get(path).status_code == 200, path
    assert integers.get("/health/live?x=1").status_code == 200


def test_erasing_takes_every_id_in_a_query_and_no_id_for_another(tmp_path: Path) -> None:
    make_store(tmp_path, ("..", "a", "b"), TEXT_ITEMS[:3])
    headers = {"authorization": f"Bearer {TOKEN}"}
    with server(tmp_path, ServerLimits(TOKEN, max_requests_per_s=0)) as (client, _):
        assert client.delete("/users", params={"user": ".."}, headers=headers).json()["events"] == 2
    # A line that ends the id for the process must not end it twice: "a\n" is not "a".
    assert erase_in_subprocess(tmp_path / "s", "a\n")["events"] == 0
    assert Recommender.load(tmp_path / "s").recommend("a")["fallback"].to_list()[:1] == [None]


def test_erasing_refuses_an_id_that_cannot_be_in_the_log(integer_store: Path) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    with server(integer_store, ServerLimits(TOKEN, max_requests_per_s=0)) as (client, _):
        for path in ("/users/05", "/users?user=05"):
            answer = client.delete(path, headers=headers)
            assert answer.status_code == 422 and "Did you mean 5?" in answer.json()["detail"]


def test_every_example_of_the_api_document_is_valid(integers: TestClient) -> None:
    document = integers.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    bodies = [
        route["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for methods in document["paths"].values()
        for route in methods.values()
        if "requestBody" in route
    ]
    assert set(bodies) == {"RecommendRequest", "ClicksRequest", "RollbackRequest"}
    assert all(schemas[name]["examples"] for name in bodies)
    parameters_ = [one for methods in document["paths"].values() for route in methods.values()
                   for one in route.get("parameters", [])]  # fmt: skip
    for schema in (*schemas.values(), *(one["schema"] for one in parameters_)):
        for example in schema.get("examples", []):
            jsonschema_rs.validate({**schema, "components": document["components"]}, example)
    assert any("examples" in one["schema"] for one in parameters_)


def test_paths_with_an_id_have_the_same_answers_as_queries(integers: TestClient) -> None:
    for path, other in (
        ("/recommend/5?k=2", "/recommend?user=5&k=2"),
        ("/similar/1?k=2", "/similar?item=1&k=2"),
        ("/users/5/interests", "/users/interests?user=5"),
        ("/explain/5/1", "/explain?user=5&item=1"),
    ):
        assert integers.get(path).json() == integers.get(other).json() != {}, path


# -- the command line


def parameters(name: str) -> Any:
    commands: Any = get_command(app)
    return commands.commands[name].params


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        ("recommend", "-5 -k 3 -x --json", "-k 3 --json -- -5 -x"),
        ("recommend", "--store s u -5", "--store s -- u -5"),
        ("recommend", "-k3 k -kk - -5", "-k3 -kk -- k - -5"),  # -kk is k = "k", which is refused
        ("recommend", "-5 --jsn", "--jsn -- -5"),  # refused as an option that does not exist
        ("recommend", "--store=s --allow -5 -6", "--store=s --allow -5 -- -6"),
        ("recommend", "-5 -- --json -k", "-- -5 --json -k"),
        ("erase", "-k --wait 1m", "--wait 1m -- -k"),  # `erase` has no -k
        ("inspect", "user -5", "-- user -5"),
    ],
)
def test_an_id_that_starts_with_a_minus_is_no_option(command: str, words: str, expected: str) -> None:
    assert separate_ids(words.split(), parameters(command)) == expected.split()


def test_an_option_with_one_minus_too_few_is_refused() -> None:
    with pytest.raises(OptionError, match='Did you mean "--store"'):
        separate_ids(["5", "-store", "s"], parameters("recommend"))
    with pytest.raises(OptionError, match='Did you mean "--json"'):
        separate_ids(["-json"], parameters("erase"))


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        (["a,b"], ["a", "b"]),
        ([" a , b ,,"], ["a", "b"]),
        (['"a,b"'], ["a,b"]),
        (['"a,b",c , " d "'], ["a,b", "c", " d "]),
        (["a", "b,c"], ["a", "b", "c"]),
        (['say ""hi""'], ['say ""hi""']),
        (['"say ""hi"", you"'], ['say "hi", you']),
        (['5" disk,x'], ['5" disk', "x"]),
        ([""], []),
    ],
)
def test_lists_of_ids_are_quoted_as_in_csv(lists: list[str], expected: list[str]) -> None:
    assert parse_ids(lists) == expected


@pytest.mark.parametrize("text", ['"a,b', '"a"b', 'x,"'])
def test_an_open_quotation_mark_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="has no end"):
        parse_ids([text])


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """Run a command with --json. Returns what it prints."""
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_commands_take_every_id_and_print_numbers_beyond_2_53_as_text(
    integer_store: Path, text_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_integers, of_texts = ["--store", str(integer_store / "s")], ["--store", str(text_store / "s")]
    capsys.readouterr()
    for words in (["recommend", "-5", "--no-exclude-seen"], ["inspect", "user", "-5"], ["similar", str(LARGE + 1)]):
        found = ids_in(printed(capsys, *words, *of_integers))
        assert found and {int(one) for one in found} <= {*INTEGER_USERS, *INTEGER_ITEMS}
        assert all(isinstance(one, str) == (abs(int(one)) > SAFE) for one in found)
    explained = printed(capsys, "explain", "-5", str(LARGE + 1), *of_integers)
    assert explained and all(type(one["because"]) in (int, str) for one in explained)
    found = printed(capsys, "recommend", *of_texts, "-x", "-5", "--no-exclude-seen", "--allow", '"a,b"', "--allow", "i")
    assert {one["user_id"] for one in found} == {"-x", "-5"} and {one["item_id"] for one in found} == {"a,b", "i"}
    assert main(["recommend", "--x", *of_texts]) == 2
    assert main(["recommend", *of_texts, "--", "--x"]) == 0


def test_a_filter_without_any_known_item_is_noted(text_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", "..", "--allow", "a,b", "--store", str(text_store / "s")]) == 0
    assert "The log has no item of --allow" in capsys.readouterr().err


# -- Python


@pytest.fixture(scope="module")
def recommender(integer_store: Path) -> Recommender:
    return Recommender.load(integer_store / "s")


@pytest.mark.parametrize(
    "users",
    [5, "5", np.int64(5), np.uint8(5), 5.0, np.float32(5), [5], ["5"], np.array(5), np.array([5]), np.array([5.0]),
     np.array(["5"]), np.array([5], dtype=object), pl.Series([5]), pl.Series(["5"]),
     torch.tensor(5), torch.tensor([5])],
)  # fmt: skip
def test_every_spelling_of_an_integer_is_the_same_user(users: Any, recommender: Recommender) -> None:
    found = recommender.recommend(users, k=1, exclude_seen=False)
    assert found["user_id"].to_list() == [5] and found["fallback"].to_list() == [None]


def test_numbers_and_texts_may_be_mixed(recommender: Recommender) -> None:
    found = recommender.recommend([5, "7", np.int32(-5)], k=1, allow=["1", np.int64(LARGE + 1)], exclude_seen=False)
    assert found["user_id"].to_list() == [5, 7, -5]


@pytest.mark.parametrize(
    "users",
    [b"5", bytearray(b"5"), memoryview(b"5"), np.array([b"5"]), [b"5"], True, np.True_, None, [None], [[5]], "05", " 5",
     5.5, float("nan"), 2.0**53, 2**63, np.array([[5]]), pl.Series([True]), pl.Series([5, None]), "\ud800"],
)  # fmt: skip
def test_what_is_no_id_is_refused(users: Any, recommender: Recommender) -> None:
    with pytest.raises(LogError, match="user_id"):
        recommender.recommend(users)


def test_a_length_may_be_any_integer_and_nothing_else() -> None:
    for k in (np.int64(2), np.uint8(2), np.array(2)):
        request = ListRequest(k=k)  # type: ignore[arg-type]
        assert request == ListRequest(k=2) and type(request.k) is int
    for wrong in (True, np.True_, 2.0, "2", None, np.array([2])):
        with pytest.raises(OptionError, match="must be an integer"):
            ListRequest(k=wrong)  # type: ignore[arg-type]
    assert ListRequest(diversity=np.float32(0.5)).diversity == 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize("category", [12, "12", 12.0, np.int64(12)])
def test_a_category_may_be_a_number(category: Any, recommender: Recommender) -> None:
    assert len(recommender.recommend(5, category=category, exclude_seen=False)) == 3


@pytest.mark.parametrize("category", [b"12", True, "012", 13])
def test_another_category_is_refused(category: Any, recommender: Recommender) -> None:
    with pytest.raises(FreshrecError, match="category"):
        recommender.recommend(5, category=category)
