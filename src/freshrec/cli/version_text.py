"""A version in one line of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from freshrec.store.manifest import Manifest


def version_line(version: Manifest) -> str:
    """A version in a line: what it has learnt, how long that took, how good it is, and the verdict."""
    numbers, parts = version.numbers, list[str]()
    name = f"version {version.id}" + (f" from {version.parent}" if version.parent is not None else "")
    if version.kind in ("fit", "update"):
        new = "" if version.kind == "fit" else "new "
        counts = [("new_events", "events"), ("new_users", f"{new}users"), ("new_items", f"{new}items")]
        counts += [("gained_interests", "users gained an interest"), ("lost_interests", "users lost one")]
        parts = [", ".join(f"{int(numbers[key]):,} {word}" for key, word in counts if key in numbers)]
        full = f" (full retrain estimated {numbers['full_s']:.0f} s)" if "full_s" in numbers else ""
        parts += [f"{numbers.get('wait_s', 0.0):.1f} s{full}"]
    parts += [quality for quality in [_quality_text(numbers)] if quality]
    verdict = {"fit": "first version", "update": "promoted", "no rows": "no rows", "saved": "saved from Python"}
    refused = "refused, live by force" if version.goes_live else "refused"
    parts += [verdict[version.kind] if version.promoted else refused]
    return f"{name}: {'; '.join(parts)}"


def _quality_text(numbers: dict[str, float]) -> str:
    """The metric of a version beside that of the live one, or of popularity."""
    metric = next((name.removesuffix(" live") for name in numbers if name.endswith(" live")), "")
    if metric:
        found = f"{metric} {numbers[metric]:.4f} against live {numbers[f'{metric} live']:.4f}"
        if "low" in numbers:
            found += f" ({numbers['low']:+.4f} to {numbers['high']:+.4f})"
        return found + (f", forgetting {numbers['forgetting']:+.4f}" if "forgetting" in numbers else "")
    metric = next((name.removesuffix(" popularity") for name in numbers if name.endswith(" popularity")), "")
    return f"{metric} {numbers[metric]:.4f}, popularity {numbers[f'{metric} popularity']:.4f}" if metric else ""
