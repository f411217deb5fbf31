"""Slices of the targets: known or new pairs, old or new items and users, head or tail."""

import polars as pl

from freshrec.types import TEST, Span

SLICES = {
    "all": "every query",
    "known pair": "the user has an earlier event with the item",
    "new pair": "the user has no earlier event with the item",
    "old item": "the item first occurred at least two spans earlier",
    "new item": "the item first occurred in the previous span",
    "unseen item": "the item first occurs in this span, so no earlier update has learned it",
    "old user": "the user has events before this span",
    "new user": "the user first occurs in this span",
    "head": "the most popular items, with half of all earlier events together",
    "tail": "all other items",
}  # (known pair, new pair), (old, new, unseen item), (old, new user) and (head, tail) each add up to all


def slice_table(spans: tuple[Span, ...]) -> pl.DataFrame:
    """The TEST events of all spans after the base: span, event (position in it), user, item, a column per slice."""
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
    """All events of a span: span, event (position in it), user, item, role."""
    events = span.events
    columns = {"user": events.users_E.numpy(), "item": events.items_E.numpy(), "role": events.role_E.numpy()}
    number = pl.lit(span.index, pl.Int32).alias("span")
    return pl.DataFrame(columns).select(number, pl.int_range(pl.len()).alias("event"), "user", "item", "role")


def _known_before(spans: tuple[Span, ...]) -> pl.DataFrame:
    """Number of users and items known before each span, and number of items known one span earlier.

    Before span 1 there is only the base block, so its items count as old.
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
    """The most popular items before the span, which together have half of the earlier events: span, item, head."""
    counts = events.lazy().filter(pl.col("span") < span).group_by("item").len().sort("len", "item", descending=True)
    events_before = pl.col("len").cum_sum() - pl.col("len")
    top = counts.filter(events_before < pl.col("len").sum() / 2)
    return top.select(pl.lit(span, pl.Int32).alias("span"), "item", pl.lit(True).alias("head")).collect()
