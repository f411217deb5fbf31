"""The number of epochs of a method's updates, and what stopped their training, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from freshrec.learn.fit import STOPPED_BY, FitConfig

FIXED, MIXED = "fixed", "mixed"
EPOCH_COSTS = ("epochs", *(f"stopped_by_{reason}" for reason in STOPPED_BY))  # names of the costs of an update


@dataclass(frozen=True)
class EpochSummary:
    """The epochs of a method, as means over its updates and seeds. `learn.fit.EpochChoice` defines the reasons."""

    n_epochs: float
    shares: Mapping[str, float]  # reason -> share of the trainings that it stopped; empty = fixed by an option

    @property
    def number(self) -> str:
        """The number with at most one decimal: "5" or "12.4"."""
        return f"{self.n_epochs:.1f}".removesuffix(".0")

    @property
    def reasons(self) -> str:
        """The reasons: "fixed", "patience", or "patience 60 %, minimum 40 %"."""
        if len(self.shares) < 2:
            return next(iter(self.shares), FIXED)
        return ", ".join(f"{reason} {_percent(share)}" for reason, share in self.shares.items())

    @property
    def long(self) -> str:
        """Number and reasons: "5 (fixed)" or "6.2 (patience 60 %, minimum 40 %)"."""
        return f"{self.number} ({self.reasons})"

    @property
    def short(self) -> str:
        """Rounded number and one word: "5 fixed", "12 patience" or "6 mixed"."""
        return f"{self.n_epochs:.0f} {self.reason}"

    @property
    def reason(self) -> str:
        """One word for all reasons: "fixed", "patience", "minimum", "maximum" or "mixed"."""
        return MIXED if len(self.shares) > 1 else self.reasons


def summarize_epochs(costs: Mapping[str, float]) -> EpochSummary | None:
    """Return the epochs in the costs of an update, or in means of such costs; None if no model was trained."""
    if "epochs" not in costs:
        return None
    shares = {reason: costs.get(f"stopped_by_{reason}", 0.0) for reason in STOPPED_BY}
    return EpochSummary(costs["epochs"], {reason: share for reason, share in shares.items() if share > 0})


def epochs_of_method(
    rows: Mapping[tuple[str, str, str], Mapping[str, Any]], model: str, strategy: str
) -> EpochSummary | None:
    """Return the epochs of a method from rows by (model, strategy, metric). `model` may end with a readout."""
    method = model.partition("@")[0], strategy
    return summarize_epochs({name: rows[*method, name]["value"] for name in EPOCH_COSTS if (*method, name) in rows})


def explain_reasons(trainings: Sequence[tuple[EpochSummary, FitConfig]], is_mixed_shown: bool) -> str:
    """Explain each reason for these numbers of epochs, with the limits in the options."""
    limits: dict[str, set[int]] = {}
    for epochs, fit in trainings:
        limit = {"patience": fit.patience, "minimum": fit.min_epochs, "maximum": fit.max_epochs, FIXED: 0}
        for reason in epochs.shares or (FIXED,):
            limits.setdefault(reason, set()).add(limit[reason])
    texts = {
        FIXED: "an option",
        "patience": "the quality of held-out events had not risen for {} epochs",
        "minimum": "raised to {}",
        "maximum": "training reached {}",
    }
    sentences = [
        f"{reason}: {text.format(' or '.join(map(str, sorted(limits[reason]))))}."
        for reason, text in texts.items()
        if reason in limits
    ]
    if is_mixed_shown and any(epochs.reason == MIXED for epochs, _ in trainings):
        sentences.append("mixed: several reasons; table.md has their shares.")
    return " ".join(sentences)


def _percent(share: float) -> str:
    """Return a share between 0 and 1, both excluded, in percent."""
    if share < 0.005:
        return "<1 %"
    return ">99 %" if share >= 0.995 else f"{100 * share:.0f} %"
