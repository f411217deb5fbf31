"""The commands that read a store and change nothing: recommend, similar, explain, inspect, status, diff, doctor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from freshrec.cli.id_arguments import parse_ids
from freshrec.cli.inspection_text import diff_lines, status_lines
from freshrec.cli.options import AllowImport, AsJson, SignKeyFile, StoreOption, StorePath
from freshrec.cli.output import print_json, print_labelled, print_table
from freshrec.errors import LogError, OptionError, StateError
from freshrec.recommender.list_request import DEFAULTS, help_of
from freshrec.text_layout import format_count

if TYPE_CHECKING:
    import polars as pl

    from freshrec.recommender.bundle import Bundle


def require_positive(k: int) -> int:
    """Return the length of a list. Raises OptionError unless it is at least 1."""
    if k < 1:
        raise OptionError(f"--k is {k}. It must be at least 1.")
    return k


def require_weight(diversity: float) -> float:
    """Return the value of --diversity. Raises OptionError unless it is a finite number of at least 0."""
    if not (isfinite(diversity) and diversity >= 0):
        raise OptionError(f"--diversity is {diversity:g}. It must be a finite number of at least 0.")
    return diversity


K = Annotated[int, typer.Option("--k", "-k", callback=require_positive, help=help_of("k"))]
VersionOption = Annotated[int | None, typer.Option("--version", help="Version to use (default: the live one).")]


def recommend(
    users: Annotated[list[str], typer.Argument(metavar="USER...", help="User ids. Unknown users get popular items.")],
    store: StorePath = Path("store"),
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    k: K = DEFAULTS.k,
    exclude_seen: Annotated[
        bool, typer.Option("--exclude-seen/--no-exclude-seen", help=help_of("exclude_seen"))
    ] = DEFAULTS.exclude_seen,
    allow: Annotated[list[str] | None, typer.Option(metavar="ITEM,...", help=help_of("allow"))] = None,
    deny: Annotated[list[str] | None, typer.Option(metavar="ITEM,...", help=help_of("deny"))] = None,
    category: Annotated[str | None, typer.Option(help=help_of("category"))] = None,
    diversity: Annotated[float, typer.Option(callback=require_weight, help=help_of("diversity"))] = DEFAULTS.diversity,
    version: VersionOption = None,
    as_json: AsJson = False,
) -> None:
    """Print recommended items for each user."""
    from freshrec.recommender.ids import known_item_rows
    from freshrec.recommender.recommender import Recommender

    allowed, denied = (None if lists is None else parse_ids(lists) for lists in (allow, deny))
    recommender = Recommender.from_bundle(_open_bundle(store, sign_key_file, version))
    with _id_errors_as_option_errors():
        found = recommender.recommend(users, k, exclude_seen, allowed, denied, category, diversity)
        if allowed and not len(known_item_rows(recommender.served, allowed)):
            typer.echo("note: The log has no item of --allow. Write '\"a,b\"' for an id with a comma.", err=True)
    rows = [(user, rank, item, f"{score:.4g}", fallback) for user, item, score, rank, fallback in found.iter_rows()]
    _print_lists(found, ("user", "rank", "item", "score", "fallback"), rows, as_json)


def similar(
    items: Annotated[list[str], typer.Argument(metavar="ITEM...", help="Item ids.")],
    store: StorePath = Path("store"),
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    k: K = DEFAULTS.k,
    version: VersionOption = None,
    as_json: AsJson = False,
) -> None:
    """Print the most similar items for each item."""
    from freshrec.recommender.recommender import Recommender

    recommender = Recommender.from_bundle(_open_bundle(store, sign_key_file, version))
    with _id_errors_as_option_errors():
        found = recommender.similar_items(items, k)
    rows = [(item, rank, other, f"{score:.4g}") for item, other, score, rank in found.iter_rows()]
    _print_lists(found, ("item", "rank", "similar", "score"), rows, as_json)


def explain(
    user: Annotated[str, typer.Argument(metavar="USER", help="User id.")],
    item: Annotated[str, typer.Argument(metavar="ITEM", help="Item id.")],
    store: StorePath = Path("store"),
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    version: VersionOption = None,
    as_json: AsJson = False,
) -> None:
    """Explain the score of an item for a user: its rank, its contributions, and the most important past event."""
    from freshrec.recommender.explanation import explain_pair, explanation_text
    from freshrec.recommender.recommender import Recommender

    bundle = _open_bundle(store, sign_key_file, version)
    with _id_errors_as_option_errors():
        if as_json:
            print_json(Recommender.from_bundle(bundle).explain(user, item).to_dicts())
            return
        found = explain_pair(bundle.served, user, item, bundle.names[0], bundle.read_options.has_clock)
    typer.echo(explanation_text(found))


def require_kind(kind: str) -> str:
    """Return what to inspect. Raises OptionError unless it is "user" or "item"."""
    if kind not in ("user", "item"):
        raise OptionError(f'"{kind[:60]}" is neither user nor item. Write `freshrec inspect user ID`.')
    return kind


def inspect(
    kind: Annotated[str, typer.Argument(metavar="user|item", callback=require_kind, help="What to show.")],
    name: Annotated[str, typer.Argument(metavar="ID", help="User id or item id.")],
    store: StorePath = Path("store"),
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    version: VersionOption = None,
    as_json: AsJson = False,
) -> None:
    """Print the events and interests of a user, or the statistics of an item."""
    from freshrec.nightly import inspection
    from freshrec.store.versions import open_store

    bundle = _open_bundle(store, sign_key_file, version)
    with _id_errors_as_option_errors():
        found = inspection.user_profile(bundle, name) if kind == "user" else inspection.item_profile(bundle, name)
    if as_json:
        print_json(found)
        return
    from freshrec.recommender.profile_text import item_text, user_text

    versions = _versions_of_spans(store, sign_key_file, version)
    typer.echo(user_text(found, versions) if kind == "user" else item_text(found, versions))
    n_refused = 0
    with suppress(StateError):  # `freshrec doctor` reports damage
        n_refused = inspection.count_refused_events(open_store(store, sign_key_file), f"{kind}_id", found[f"{kind}_id"])
    if n_refused:
        typer.echo(f"\nNot counted: {format_count(n_refused, 'event')} in refused deliveries.")


def status(
    store: StorePath = Path("store"),
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Print the live version and its quality, the size of the store, and the events that wait for the next update."""
    from freshrec.nightly import inspection
    from freshrec.store.versions import open_store

    found = inspection.store_status(open_store(store, sign_key_file))
    print_json(found) if as_json else typer.echo("\n".join(status_lines(found)))


def diff(
    first: Annotated[int, typer.Argument(metavar="A", help="Number of the first version.")],
    second: Annotated[int, typer.Argument(metavar="B", help="Number of the second version.")],
    store: StorePath = Path("store"),
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Compare two versions: quality on the same queries, shared items of their lists, numbers and options."""
    from freshrec.nightly import inspection
    from freshrec.store.versions import open_store

    found = inspection.version_difference(open_store(store, sign_key_file), first, second)
    print_json(found) if as_json else typer.echo("\n".join(diff_lines(found)))


def doctor(
    store: Annotated[Path | None, StoreOption] = None,
    allow_import: AllowImport = None,
    sign_key_file: SignKeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Check the installation, every file of a store, and whether its versions, event log and clicks belong together."""
    from freshrec.nightly.doctor import check_store
    from freshrec.store.versions import open_store

    found = check_store(None if store is None else open_store(store, sign_key_file))
    checks = [{"ok": ok, "what": message} for ok, message in found]
    if not as_json:
        for ok, message in found:
            print_labelled([("ok" if ok else "WRONG", message)], label_width=7, indent="")
    wrong = [message for ok, message in found if not ok]
    if wrong:
        error = StateError(f"{len(wrong)} of {len(found)} checks failed. The first: {wrong[0]}")
        error.json_output = checks
        raise error
    if as_json:
        print_json(checks)


@contextmanager
def _id_errors_as_option_errors() -> Iterator[None]:
    """Turn a LogError about an id of the wrong type into an OptionError, because the user typed the id."""
    try:
        yield
    except LogError as problem:
        raise OptionError(str(problem)) from None


def _open_bundle(folder: Path, sign_key_file: Path | None, number: int | None) -> Bundle:
    """Read the bundle of a version, by default of the live one."""
    from freshrec.recommender.bundle import read_bundle
    from freshrec.store.versions import open_store

    store = open_store(folder, sign_key_file)
    return read_bundle(store.verified_files(store.live if number is None else number))


def _versions_of_spans(folder: Path, sign_key_file: Path | None, number: int | None) -> dict[int, int]:
    """Return span -> number of the version that learned it, for a version (default: the live one) and its ancestors.

    It ends before an ancestor whose manifest is damaged.
    """
    from freshrec.store.versions import open_store

    store, found = open_store(folder, sign_key_file), dict[int, int]()
    parent: int | None = store.live if number is None else number
    with suppress(StateError):
        while parent is not None:
            manifest = store.manifest(parent)
            found[manifest.spans_seen - 1] = manifest.id  # the oldest of several with the same span
            parent = manifest.parent
    return found


SCORES = "Scores compare within one list only; higher is better."


def _print_lists(found: pl.DataFrame, names: tuple[str, ...], rows: list[tuple[Any, ...]], as_json: bool) -> None:
    """Print ranked lists as a table with a note about its scores, or as JSON."""
    if as_json:
        print_json(found.to_dicts())
    else:
        print_table(names, rows)
        typer.echo(SCORES)


def _print_fields(values: dict[str, Any]) -> None:
    """Print names and values in two columns. A value of None is unknown and left out; ids are printed unchanged."""
    known = {name: value for name, value in values.items() if value is not None}
    shown = {name: str(value) if name.endswith("_id") else _format_value(value) for name, value in known.items()}
    print_table(("", ""), [(name.replace("_", " "), value) for name, value in shown.items()])


def _format_value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)
