"""Everything that users of 0.1.0 could type and parse still works: commands, flags, options, recipes, routes, JSON.

tests/gold/commands-0.1.0.json holds the commands and routes of README.md, docs/operations.md and docs/serving.md as
these pages stood in 0.1.0 (commit 844d548); tests/gold/words-0.1.0.json holds the names. Both were written by 0.1.0
and never change. A renamed word needs an alias.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2
import polars as pl
import pytest
from typer.main import get_command

import freshrec
from freshrec.cli.app import OLD_FLAGS, app, main
from freshrec.data.synthetic import make_world
from freshrec.disk_names import RECIPE_KEYS
from freshrec.models import find_model
from freshrec.nightly.gate import GateLimits, parse_limits
from freshrec.replay.recipe_schema import parse_recipe
from freshrec.strategies import find_strategy

GOLD = Path(__file__).parent / "gold"
PAGES: dict[str, list[Any]] = json.loads((GOLD / "commands-0.1.0.json").read_text())
WORDS: dict[str, Any] = json.loads((GOLD / "words-0.1.0.json").read_text())
QUICK = ":fit.base_epochs=1:fit.epochs=1"


def write_logs(folder: Path) -> None:
    """The files that the commands name: a log and later days, in several formats."""
    log = make_world("drift", users=100, items=60, events=3600).log.frame
    log = log.select(
        user_id=pl.format("u{}", "user_id"), item_id=pl.format("i{}", "item_id"), timestamp="time",
        category=pl.format("c{}", pl.col("item_id") % 3),
    )  # fmt: skip
    parts = {"events": (0, 2600), "last-night": (2600, 3000), "later": (3000, 3300), "latest": (3300, 3600)}
    for name, (first, last) in parts.items():
        log[first:last].write_parquet(folder / f"{name}.parquet")
    log[2600:3000].rename({"user_id": "uid"}).write_parquet(folder / "uid.parquet")
    spoilt = log[3000:3300].with_columns(item_id=pl.lit("i1"), timestamp=pl.col("timestamp") + 1)
    spoilt.write_parquet(folder / "spoilt.parquet")
    inter = log.select(
        pl.col("user_id").alias("user_id:token"),
        pl.col("item_id").alias("item_id:token"),
        (pl.col("timestamp") / 1e6).alias("timestamp:float"),
    )
    inter.write_csv(folder / "u.inter", separator="\t")
    (folder / "token").write_text("0123456789abcdef-a-token")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which the commands run."""
    write_logs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str) -> int:
    """Run a command as typed. To save time, replays train for one epoch, and models have 8 dimensions."""
    words = shlex.split(line, comments=True)[1:]
    if words[0] == "replay" and "--out" in words:
        words[words.index("--models") + 1] = "comirec-dr:d=8:negatives=16,sasrec:d=8:negatives=16"
        ways = ("frozen", "finetune", "full", "imsr")
        words[words.index("--strategies") + 1] = ",".join(f"{way}{QUICK}" for way in ways)
        words += ["--spans", "2"]
    return main(words)


@pytest.mark.parametrize("page", [page for page in PAGES if "serving" not in page])
def test_the_commands_of_the_pages_of_0_1_0_run(page: str, shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if page == "README.md, words in comments":
        prepare = ["fit events.parquet --store shop --model item-knn", "update last-night.parquet --store shop"]
        for line in prepare:
            main([*shlex.split(line), *(["--force", "--reason", "a test"] if "update" in line else [])])
    for line in PAGES[page]:
        if " serve " in line:  # it runs until it is stopped; see the routes
            continue
        if page == "docs/operations.md" and "fit events.parquet --until" in line:
            line += " --model item-knn"  # every model refuses a corrupted day, and this one is fast
        capsys.readouterr()
        code = run(line)
        expected = int(found.group(1)) if (found := re.search(r"exit code (\d+)", line)) else 0
        assert code == expected, (line, capsys.readouterr())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with a store of two versions, and the address of its server, which requires a token."""
    folder = tmp_path_factory.mktemp("served")
    write_logs(folder)
    shop = str(folder / "shop")
    assert main(["fit", str(folder / "events.parquet"), "--store", shop, "--model", "item-knn"]) == 0
    assert main(["update", str(folder / "last-night.parquet"), "--store", shop, "--force", "--reason", "a test"]) == 0
    with serving(folder, "--host", "0.0.0.0", "--token-file", "token") as address:
        yield folder, address


class serving:  # noqa: N801
    """`freshrec serve --store shop` in `folder`; its address."""

    def __init__(self, folder: Path, *words: str) -> None:
        command = [sys.executable, "-m", "freshrec", "serve", "--store", "shop", "--port", "0", *words]
        self.process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> str:
        assert self.process.stderr
        for line in self.process.stderr:
            if found := re.search(r"listening on http://[\d.]+:(\d+)", line):
                return f"http://127.0.0.1:{found.group(1)}"
        raise AssertionError("the server ended")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        assert self.process.stderr
        self.process.stderr.close()
        self.process.wait(20)


def test_the_server_of_the_readme_of_0_1_0_starts_and_requires_its_token(served: tuple[Path, str]) -> None:
    with serving(served[0]) as address:
        assert httpx2.get(f"{address}/recommend/u42").status_code == 200
    assert httpx2.get(f"{served[1]}/recommend/u42").status_code == 401


@pytest.mark.parametrize(("method", "path", "body", "status"), PAGES["docs/serving.md, routes"])
def test_the_routes_of_0_1_0_answer(method: str, path: str, body: Any, status: int, served: tuple[Path, str]) -> None:
    token = {"Authorization": f"Bearer {(served[0] / 'token').read_text()}"}
    answer = httpx2.request(method, served[1] + path, json=body, headers=token, timeout=60)
    assert answer.status_code == status, answer.text
    if answer.headers["content-type"] == "application/json":
        assert WORDS["http"][f"{method} {path}"] == keys_of(answer.json())


def keys_of(node: Any) -> Any:
    """The keys of a JSON document without its values. A list stands for its first entry."""
    if isinstance(node, dict):
        return {name: keys_of(child) for name, child in sorted(node.items())}
    return [keys_of(child) for child in node[:1]] if isinstance(node, list) else None


@pytest.mark.parametrize("command", [line for line in PAGES["docs/serving.md"] if " bench " in line])
def test_the_load_tests_of_the_pages_of_0_1_0_run(
    command: str, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(served[0])
    assert run(command) == 0


def test_the_exports_of_the_pages_of_0_1_0_run(shop: Path) -> None:
    way = ("--model", "comirec-dr:d=8", "--strategy", f"finetune{QUICK}")
    assert main(["fit", "events.parquet", "--store", "vectors", *way]) == 0
    for command in PAGES["docs/serving.md"]:
        if " export " in command:
            assert run(command) == 0


def commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command, by the words that a user types."""
    below = getattr(command, "commands", None)  # noqa: B009
    if below is None:
        yield name, command
        return
    for word, one in below.items():
        yield from commands(one, f"{name} {word}".strip())


@pytest.mark.parametrize("name", WORDS["flags"])
def test_every_flag_of_0_1_0_is_accepted(name: str) -> None:
    parameters = dict(commands(get_command(app)))[name].params
    flags = {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert set(WORDS["flags"][name]) - flags - OLD_FLAGS.get(name.split()[0], {}).keys() == set()


RENAMED = pytest.mark.filterwarnings("ignore:.*the old name still works:FutureWarning")


@RENAMED
@pytest.mark.parametrize("kind", ["models", "strategies"])
def test_every_name_and_option_of_0_1_0_is_accepted(kind: str) -> None:
    find: Any = {"models": find_model, "strategies": find_strategy}[kind]
    for name, options in WORDS["options"][kind].items():
        assert find(":".join([name, *options])) == find(name), name


@RENAMED
def test_every_limit_of_the_gate_of_0_1_0_is_accepted_and_has_its_default() -> None:
    for limit in WORDS["gate"]:
        assert parse_limits(limit) == GateLimits(), limit


@RENAMED
def test_every_recipe_key_of_0_1_0_is_accepted() -> None:
    for part, keys in WORDS["recipe_keys"].items():
        default = asdict(parse_recipe({}))[part]
        for key in keys:
            value = default[RECIPE_KEYS.get(part, {}).get(key, key)]
            assert parse_recipe({part: {key: value}}) == parse_recipe({})


def test_a_former_name_is_accepted_with_one_line_of_warning(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "events.parquet", "--store", "a", "--model", "popularity:keep=last"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if not re.match(r"\[\d+ s\] ", line)]  # progress
    assert lines == ["warning: option keep of popularity:keep=last is now called weighting. The old name still works."]
    with pytest.warns(FutureWarning, match="strategy rehearsed is now called self-tuned"):
        assert find_strategy("rehearsed") == find_strategy("self-tuned")
    with pytest.warns(FutureWarning, match="steps=lanes of gru4rec:steps=lanes is now called session-parallel"):
        assert find_model("gru4rec:steps=lanes") == find_model("gru4rec:steps=session-parallel")
    assert main(["recommend", "u1", "--store", "a", "--include-seen"]) == 0
    assert capsys.readouterr().err.count("\n") == 1


JSON_COMMANDS = (
    "recommend u42 --k 3", "similar i3 --k 3", "explain u42 i3", "inspect user u42", "inspect item i3", "status",
    "history", "diff 1 2", "doctor", "promote 1 --reason why", "promote 2 --reason why", "rollback", "gc --keep 2",
    "erase u8",
)  # fmt: skip


def json_keys(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The keys that each command prints with --json, and those of the files of a store."""
    shop, found = str(folder / "json"), {}
    lines = [f"fit {folder}/events.parquet --model item-knn", f"update {folder}/last-night.parquet --force --reason a"]
    for line in [*lines, *JSON_COMMANDS]:
        capsys.readouterr()
        assert main([*line.split(), "--store", shop, "--json"]) == 0, line
        found[" ".join(line.split()[:2] if "/" not in line else line.split()[:1])] = keys_of(
            json.loads(capsys.readouterr().out)
        )
    for name in ("store.json", "live.json", "versions/2/manifest.json"):
        found[name] = keys_of(json.loads((folder / "json" / name).read_text()))
    return found


def test_json_has_every_key_of_0_1_0(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert without_more(json_keys(shop, capsys), WORDS["json_keys"]) == WORDS["json_keys"]


def without_more(found: Any, known: Any) -> Any:
    """The keys of `found` that `known` has too. Additional keys are allowed."""
    if isinstance(known, dict) and isinstance(found, dict):
        return {name: without_more(child, known[name]) for name, child in found.items() if name in known}
    if isinstance(known, list) and isinstance(found, list):
        return [without_more(a, b) for a, b in zip(found, known)]
    return found


@pytest.mark.parametrize("module", ["freshrec", "freshrec.cli"])
def test_both_modules_run_the_command_line(module: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", module, "list", "formats"], check=True, capture_output=True, text=True
    )
    assert found.stdout.startswith("amazon ")


@pytest.mark.parametrize("name", ["make", "cut"])
def test_public_functions_of_0_1_0_work_with_a_warning(name: str) -> None:
    with pytest.warns(FutureWarning, match=f"freshrec.{name} is now called"):
        assert callable(getattr(freshrec, name))


def test_keywords_of_0_1_0_are_accepted_with_a_warning(shop: Path) -> None:
    with pytest.warns(FutureWarning, match="text is now called text_columns"):
        log = freshrec.read_log("events.parquet", text=["user_id"])
    assert log.frame["user_id"].dtype == pl.String
    with pytest.warns(FutureWarning, match="absent is now called allow_missing_events"):
        assert freshrec.read_log("events.parquet", absent=True).frame.equals(log.frame)
