"""The documented examples work in an empty folder with the installed wheel and nothing else."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from serving import listening

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"
NOON, DAY, MINUTE = 1_767_268_800, 86_400, 60  # 2026-01-01, in seconds

# Replacements that make the commands of the examples fast: part of a command -> replacement
SMALLER = {
    "sasrec": "sasrec:d=8",
    "--strategies finetune,": "--strategies ",
    "my_strategy:MyStrategy": "my_strategy:MyStrategy:fit.epochs=10:fit.base_epochs=10",
    "--world drift": "--world drift --world-users 60 --world-items 40 --world-events 1200"
    " --controls popularity --spans 2",
}


@dataclass(frozen=True)
class Installed:
    """A wheel of this checkout and the folder where it is installed."""

    wheel: Path
    site: Path

    def env(self, imported: str = "") -> dict[str, str]:
        """The environment of a command. PYTHONPATH takes precedence over an editable install of a checkout."""
        variables = {"PYTHONPATH": str(self.site), "FRESHREC_IMPORT": imported, "OMP_NUM_THREADS": "1"}
        return {**os.environ, **variables, "PYTHONSAFEPATH": "1"}  # like the script, ignore the current folder

    def run(self, folder: Path, *command: str, imported: str = "") -> str:
        """Run a command and return what it prints to stdout."""
        done = subprocess.run(command, cwd=folder, env=self.env(imported), capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def run_commands(self, folder: Path, commands: list[list[str]], imported: str) -> list[Any]:
        """Return the JSON that each command prints. All run in one process, because imports take most of the time."""
        arguments = [[*command, "--json"] for command in commands]
        code = f"import sys; from freshrec.cli.app import main; sys.exit(any([main(one) for one in {arguments!r}]))"
        text, found = self.run(folder, sys.executable, "-c", code, imported=imported).strip(), []
        while text:
            answer, end = json.JSONDecoder().raw_decode(text)
            found, text = [*found, answer], text[end:].strip()
        return found

    @property
    def freshrec(self) -> str:
        """The script that pip installs."""
        return str(self.site / "bin" / "freshrec")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    for tool in ("pip", "hatchling"):
        if find_spec(tool) is None:
            pytest.skip(f"needs {tool} to build a wheel; the dev extra has hatchling, a virtual environment pip")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-index", "--no-deps"]
    build = [*pip, "wheel", str(ROOT), *offline, "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run(build, check=True, cwd=folder, timeout=100)
    [wheel] = folder.glob("freshrec-*.whl")
    subprocess.run([*pip, "install", *offline, "--target", str(folder / "site"), str(wheel)], check=True, timeout=100)
    return Installed(wheel, folder / "site")


def test_the_wheel_holds_every_file_of_the_package(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("freshrec/")}
    source = ROOT / "src"
    there = {path.relative_to(source).as_posix() for path in (source / "freshrec").rglob("*") if path.is_file()}
    recipes = {f"freshrec/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    assert len(recipes) > 50
    assert held == {name for name in there if not name.endswith(".pyc")} | recipes
    needed = ["names.json", "py.typed", *(f"server/page/page.{kind}" for kind in ("html", "js", "css"))]
    assert {f"freshrec/{name}" for name in needed} <= held


def test_the_installed_package_runs_instead_of_the_checkout(installed: Installed, tmp_path: Path) -> None:
    found = installed.run(tmp_path, sys.executable, "-c", "import freshrec; print(freshrec.__file__)").strip()
    assert Path(found).is_relative_to(installed.site)
    version = re.search(r'__version__ = "(.+)"', (ROOT / "src" / "freshrec" / "version.py").read_text())
    assert version is not None
    for command in ([installed.freshrec], [sys.executable, "-m", "freshrec"]):
        assert installed.run(tmp_path, *command, "--version") == f"freshrec {version[1]}\n"
    assert "\nsasrec " in installed.run(tmp_path, installed.freshrec, "list", "models")


def test_the_recipes_can_be_replayed_by_name_in_an_empty_folder(installed: Installed, tmp_path: Path) -> None:
    write_logs(tmp_path)
    shutil.move(tmp_path / "events.parquet", tmp_path / "uci_online_retail.parquet")  # the log that the recipe names
    (tmp_path / "mine.toml").write_text('extends = "uci-spine"\n[spans]\nspans = 3\n')
    fast = ["--models", "item-knn", "--strategies", "absorb", "--extra-pairs", "", "--controls", "popularity", "--plan"]
    listed, plan, mine = installed.run_commands(
        tmp_path,
        [["list", "recipes"], *(["replay", "--recipe", name, *fast] for name in ("uci-spine", "mine.toml"))],
        "",
    )
    assert listed.keys() == {path.stem for path in (ROOT / "recipes").iterdir()}
    # uci-spine extends spine, which has 6 spans after the base block
    assert (len(plan["spans"]), len(mine["spans"])) == (7, 4)
    assert plan["n_runs"] == 2  # item-knn and popularity: counting models have one seed


def pairs(users: str, count: int, next_item: str, minutes_apart: int) -> list[tuple[str, str, int]]:
    """(user, item, minute): user n takes item a0 .. a3, by n modulo 4, and 20 minutes later `next_item` 0 .. 3."""
    starts = [(n, n * minutes_apart) for n in range(count)]
    first = [(f"{users}{n}", f"a{n % 4}", start) for n, start in starts]
    return first + [(f"{users}{n}", f"{next_item}{n % 4}", start + 20) for n, start in starts]


def write_logs(folder: Path) -> None:
    """Write two logs.

    events.parquet: b follows a 20 times for each of the four. u42's last item is a3, days after all other events.
    tomorrow.parquet, a week later: c follows a 30 times for each of the four.
    """
    base = [("u42", "b1", 0), *pairs("v", 80, "b", 60), ("u42", "a3", 7 * 1440)]
    for name, rows in (("events", base), ("tomorrow", pairs("w", 120, "c", 5))):
        start = NOON if name == "events" else NOON + 14 * DAY
        frame = pl.DataFrame(rows, schema=["user_id", "item_id", "minute"], orient="row").sort("minute")
        log = frame.select("user_id", "item_id", timestamp=start + MINUTE * pl.col("minute"))
        log.write_parquet(folder / f"{name}.parquet")


def request(address: str, body: Any = None) -> Any:
    """Return the JSON that answers a GET, or a POST if there is a `body`."""
    data = None if body is None else json.dumps(body).encode()
    http_request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(http_request, timeout=30) as answer:
        return json.load(answer)


def item_ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["item_id"] for row in rows]


@pytest.mark.parametrize("name", ["my_model", "my_strategy"])
def test_an_example_in_an_empty_folder_does_what_its_first_lines_say(
    name: str, installed: Installed, tmp_path: Path
) -> None:
    shutil.copy(EXAMPLES / f"{name}.py", tmp_path)
    write_logs(tmp_path)
    text = (EXAMPLES / f"{name}.py").read_text()
    assert f"\n    export FRESHREC_IMPORT={name}\n" in text
    for part, smaller in SMALLER.items():
        text = text.replace(part, smaller)
    commands = [shlex.split(line) for line in re.findall(r"^    freshrec (.+)$", text, re.MULTILINE)]
    replay, fit, update, recommend, serve = commands
    assert [command[0] for command in commands] == ["replay", "fit", "update", "recommend", "serve"]

    replayed, fitted = installed.run_commands(tmp_path, [replay, fit], name)
    [quality] = [
        row["value"]
        for row in replayed["summary"]
        if row["metric"] == "hr@20" and name in row["model"] + row["strategy"]
    ]
    assert 0 < quality < 1
    [updated], best = installed.run_commands(tmp_path, [update, recommend], name)  # a new process
    assert (fitted["id"], updated["id"], updated["promoted"]) == (1, 2, True)
    assert name in updated["recipe"]["model"] + updated["recipe"]["strategy"]
    # b3 followed a3, u42's last item, 20 times, and c3 followed it 30 times. After a click on a0, b0 and c0 are best.
    assert set(item_ids(best)[:2]) == {"b3", "c3"}
    command = [installed.freshrec, *serve, "--port", "0"]
    with listening(command, tmp_path / "serve.log", cwd=tmp_path, env=installed.env(name)) as (address, _):
        served = request(f"{address}/recommend/u42?k=10")
        assert served["version"] == 2 and item_ids(served["items"]) == item_ids(best)
        click = {"user_id": "u42", "item_id": "a0"}
        assert request(f"{address}/events", {"events": [click]})["events"][0]["folded"]
        after_click = item_ids(request(f"{address}/recommend/u42?k=10")["items"])
        assert "a0" not in after_click and after_click[0] in ("b0", "c0")
        # my_model counts all 20, and those of the 30 that are not held out to test the next version
        if name == "my_model":
            assert item_ids(best)[0] == "c3" and 20 < best[0]["score"] < 30 and best[1]["score"] == 20
            assert after_click[:2] == ["c0", "b0"]
