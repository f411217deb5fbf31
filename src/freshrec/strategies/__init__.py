"""Strategies by name. A line each; a variant is another instance, an ablation a part set to None."""

from dataclasses import replace

from freshrec.learn.fit import Fit
from freshrec.options import choose
from freshrec.strategies.imsr import IMSR, Retain
from freshrec.strategies.plain import Absorb, FineTune, Frozen, Retrain
from freshrec.types import Strategy

SPAN_ONLY = Fit(history="span")

STRATEGIES: dict[str, Strategy] = {
    "absorb": Absorb(),
    "frozen": Frozen(),
    "finetune": FineTune(),
    "finetune-span": FineTune(fit=SPAN_ONLY),
    "full": Retrain(),
    "full-warm": Retrain(fresh=False),
    "batch-3": Retrain(fresh=False, spans=3),
    "batch-5": Retrain(fresh=False, spans=5),
    "batch-7": Retrain(fresh=False, spans=7),
    "imsr": IMSR(),
    "imsr-span": IMSR(fit=SPAN_ONLY),
    "imsr-no-eir": IMSR(retain=None),
    "imsr-no-expansion": IMSR(detect=None, trim=None),
    "imsr-dir": IMSR(retain=replace(Retain(), form="distance")),
    "imsr-kd1": IMSR(retain=replace(Retain(), form="kd1")),
    "imsr-kd2": IMSR(retain=replace(Retain(), form="kd2")),
    "imsr-kd3": IMSR(retain=replace(Retain(), form="kd3", weight=1.0)),
}


def find_strategy(text: str) -> Strategy:
    """The strategy that "imsr" or "imsr:fit.epochs=5:retain.weight=1" names; OptionError for what does not exist."""
    return choose("strategy", text, STRATEGIES)
