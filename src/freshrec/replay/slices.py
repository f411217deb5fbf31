"""Slices of the targets: known and new pairs, old and new items and users, head and tail."""

import polars as pl

from freshrec.types import TEST, Span

SLICES = {
    "all": "every query",
    "known pair": "targets this user has had before",
    "new pair": "targets this user never had",
    "old item": "items of at least two spans ago",
    "new item": "items first seen in the last span",
    "unseen item": "items no model has trained on: missed unless counted within the span, or own and offered again",
    "old user": "users with events before this span",
    "new user": "users first seen in this span",
    "head": "the most popular items, which make up half of all earlier events",
    "tail": "the other items",
}  # (known pair, new pair), (old, new, unseen item), (old, new user) and (head, tail) each add up to all


def slice_table(spans: tuple[Span, ...]) -> pl.DataFrame:
    """The TEST events of every span but the base: span, event (its place there), user, item, and a column per slice."""
    events = pl.concat(_events(span) for span in spans)
    events = events.with_columns(~pl.struct("user", "item").is_first_distinct().alias("known pair"))
    targets = events.filter((pl.col("role") == TEST) & (pl.col("span") > 0))
    head = pl.concat(_head_items(events, span.index) for span in spans)
    targets = targets.join(_known_before(spans), on="span", how="left", maintain_order="left")
    targets = targets.join(head, on=["span", "item"], how="left", maintain_order="left")
    item, user = pl.col("item"), pl.col("user")
    slices = {
        "all": pl.lit(True),
        "known pair": pl.col("known pair"),
        "new pair": ~pl.col("known pair"),
        "old item": item <= pl.col("items_earlier"),
        "new item": (item > pl.col("items_earlier")) & (item <= pl.col("items_before")),
        "unseen item": item > pl.col("items_before"),
        "old user": user <= pl.col("users_before"),
        "new user": user > pl.col("users_before"),
        "head": pl.col("head").fill_null(False),
        "tail": ~pl.col("head").fill_null(False),
    }
    return targets.select("span", "event", "user", "item", *(rows.alias(name) for name, rows in slices.items()))


def _events(span: Span) -> pl.DataFrame:
    """All events of a span: span, event (its place there), user, item, role."""
    events = span.events
    columns = {"user": events.users_E.numpy(), "item": events.items_E.numpy(), "role": events.role_E.numpy()}
    number = pl.lit(span.index, pl.Int32).alias("span")
    return pl.DataFrame(columns).select(number, pl.int_range(pl.len()).alias("event"), "user", "item", "role")


def _known_before(spans: tuple[Span, ...]) -> pl.DataFrame:
    """How many users and items were known before each span, and how many items before the span before it.

    Before span 1 there is the base block only: its items count as old.
    """
    schema = {"span": pl.Int32, "users": pl.Int64, "items": pl.Int64}
    after = pl.DataFrame([(s.index, s.n_users, s.n_items) for s in spans], schema=schema, orient="row")
    users, items = pl.col("users"), pl.col("items")
    return after.select(
        "span",
        users.shift(1, fill_value=0).alias("users_before"),
        items.shift(1, fill_value=0).alias("items_before"),
        items.shift(2, fill_value=items.first()).alias("items_earlier"),
    )


def _head_items(events: pl.DataFrame, span: int) -> pl.DataFrame:
    """The most popular items of all events before the span that make up half of them: span, item, head."""
    counts = events.lazy().filter(pl.col("span") < span).group_by("item").len().sort("len", "item", descending=True)
    events_before = pl.col("len").cum_sum() - pl.col("len")
    top = counts.filter(events_before < pl.col("len").sum() / 2)
    return top.select(pl.lit(span, pl.Int32).alias("span"), "item", pl.lit(True).alias("head")).collect()
