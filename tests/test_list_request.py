"""Options of a list have the same defaults, bounds and descriptions in Python, on the command line and in HTTP."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from serving import server, stored
from typer.main import get_command

from freshrec.cli.app import app
from freshrec.errors import OptionError
from freshrec.recommender.list_request import DEFAULTS, ListRequest, check_k, help_of, lower_bound
from freshrec.recommender.recommender import Recommender
from freshrec.server import schemas

FIELDS = ("k", "exclude_seen", "allow", "deny", "category", "diversity")


def test_the_arguments_of_recommend_are_the_fields_with_the_same_order_and_defaults() -> None:
    assert tuple(ListRequest.__dataclass_fields__) == FIELDS
    arguments = inspect.signature(Recommender.recommend).parameters
    assert tuple(arguments)[2:] == (*FIELDS, "filter_seen")  # after self and users
    given = {name: arguments[name].default for name in FIELDS}
    assert given == {"k": 10, "exclude_seen": True, "allow": None, "deny": None, "category": None, "diversity": 0.0}
    assert ListRequest(10, True, None, (), None, 0.0) == DEFAULTS


def test_the_command_line_has_every_field_with_its_default_and_description() -> None:
    command: Any = get_command(app)
    options = {one.name: one for one in command.commands["recommend"].params if one.param_type_name == "option"}
    assert {name: options[name].help for name in FIELDS} == {name: help_of(name) for name in FIELDS}
    defaults = {name: options[name].default for name in FIELDS if name != "deny"}
    assert defaults == {name: getattr(DEFAULTS, name) for name in FIELDS if name != "deny"}
    assert "--no-exclude-seen" in options["exclude_seen"].secondary_opts


def test_both_http_routes_have_every_field_with_its_default_and_description(tmp_path: Path) -> None:
    stored(tmp_path, "popularity")
    with server(tmp_path) as (client, _):
        document = client.get("/openapi.json").json()
    query = {one["name"]: one for one in document["paths"]["/recommend/{user}"]["get"]["parameters"]}
    body = document["components"]["schemas"]["RecommendRequest"]["properties"]
    for name in FIELDS:
        assert query[name]["description"] == body[name]["description"] == help_of(name)
    for name in ("k", "exclude_seen", "diversity"):
        assert query[name]["schema"]["default"] == body[name]["default"] == getattr(DEFAULTS, name)
    assert (query["k"]["schema"]["minimum"], query["k"]["schema"]["maximum"]) == (1, 500)
    assert (query["diversity"]["schema"]["minimum"], query["diversity"]["schema"]["maximum"]) == (0, 1e6)
    assert schemas.RecommendRequest(users=["u"]).to_request() == DEFAULTS


def test_ids_of_an_http_request_keep_their_types() -> None:
    both = schemas.RecommendRequest(
        users=["u"], k=3, exclude_seen=False, allow=[1, "x"], deny=[2, 3], category="c", diversity=0.5
    )
    assert both.to_request() == ListRequest(3, False, (1, "x"), (2, 3), "c", 0.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 0}, "k is 0, but must be an integer of at least 1"),
        ({"k": 2.5}, "k is 2.5"),
        ({"diversity": -0.1}, "Option diversity is -0.1. It must be at least 0"),
        ({"diversity": math.nan}, "Option diversity is nan. It must be at least 0 and finite."),
        ({"diversity": math.inf}, "Option diversity is inf. It must be at least 0 and finite."),
    ],
)
def test_a_value_out_of_bounds_is_an_error(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        ListRequest(**options)


def test_the_bounds_are_those_of_the_fields() -> None:
    assert (lower_bound("k"), lower_bound("diversity")) == (1, 0)
    assert check_k(1) == 1


def test_the_keyword_of_0_1_0_still_works_with_a_warning() -> None:
    log = pl.DataFrame({"user_id": ["u", "u", "v"], "item_id": ["a", "b", "a"], "timestamp": [1e9, 1e9 + 1, 1e9 + 2]})
    recommender = Recommender("popularity").fit(log)
    assert recommender.recommend("u").is_empty()  # u has had both items
    with pytest.warns(FutureWarning, match="filter_seen is now called exclude_seen") as caught:
        found = recommender.recommend("u", filter_seen=False)
    assert found["item_id"].to_list() == ["a", "b"]
    assert [one.filename for one in caught] == [__file__]  # the line of the caller, once
    assert found.equals(recommender.recommend("u", exclude_seen=False))


def test_the_options_of_a_list_are_imported_without_torch() -> None:
    code = "import sys, freshrec.recommender.list_request; assert not {'torch', 'polars'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
