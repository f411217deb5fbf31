"""Strategies by name. A line each; a variant is another instance, an ablation a part set to None."""

import warnings
from dataclasses import replace

from freshrec.config import find_instance
from freshrec.deprecation import describe_rename
from freshrec.learn.fit import FitConfig
from freshrec.learn.transfer import CNNTransfer, LinearTransfer, MLPTransfer
from freshrec.strategies.ader import ADER
from freshrec.strategies.ader_s import ADERS
from freshrec.strategies.asmg import ASMG
from freshrec.strategies.baselines import Absorb, FineTune, Frozen, Retrain
from freshrec.strategies.ewc import EWC
from freshrec.strategies.imsr import IMSR, Retainer
from freshrec.strategies.incctr import IncCTR
from freshrec.strategies.refit import Refit
from freshrec.strategies.self_tuned import SelfTuned
from freshrec.strategies.sml import SML
from freshrec.strategies.spmf import SPMF
from freshrec.types import Strategy
from freshrec.user_modules import Interface, as_instance

SPAN_ONLY = FitConfig(history="span")

STRATEGIES: dict[str, Strategy] = {
    "absorb": Absorb(),
    "refit": Refit(),
    "frozen": Frozen(),
    "finetune": FineTune(),
    "finetune-span": FineTune(fit=SPAN_ONLY),
    "full": Retrain(),
    "full-warm": Retrain(from_scratch=False),
    "batch-3": Retrain(from_scratch=False, spans=3),
    "batch-5": Retrain(from_scratch=False, spans=5),
    "batch-7": Retrain(from_scratch=False, spans=7),
    "ewc": EWC(),
    "spmf": SPMF(),
    "spmf-all": SPMF(take="all"),
    "incctr": IncCTR(),
    "er-random": ADER(distil=False, select="random"),
    "er-loss": ADER(distil=False, select="loss"),
    "er-herding": ADER(distil=False),
    "ader": ADER(),
    "ader-equal": ADER(equal=True, allocate="multinomial"),
    "ader-fix": ADER(adaptive=False),
    "ader-s": ADERS(),
    "sml": SML(),
    "sml-5x5": SML(transfer=CNNTransfer(filters=10, filters2=10, hidden=40, kernel="5x5")),
    "sml-linear": SML(transfer=LinearTransfer(learned=True)),
    "sml-mlp": SML(transfer=MLPTransfer()),
    "sml-no-cnn": SML(transfer=CNNTransfer(filters=0)),
    "sml-no-fc": SML(transfer=CNNTransfer(hidden=0)),
    "sml-n": SML(objective="current"),
    "sml-s": SML(last_trained_span=0, fit=FitConfig(epochs=2)),
    "sml-fp": SML(train_through_transfer=False),
    "asmg": ASMG(),
    "asmg-gru-single": ASMG(loss="last"),
    "asmg-gru-full": ASMG(k=0, carry=False),
    "asmg-gru-zero": ASMG(carry=False),
    "asmg-gru-unif": ASMG(loss="uniform"),
    "asmg-linear": ASMG(generator="linear", loss="last"),
    "self-tuned": SelfTuned(),
    "imsr": IMSR(),
    "imsr-span": IMSR(fit=SPAN_ONLY),
    "imsr-no-eir": IMSR(retain=None),
    "imsr-no-expansion": IMSR(detect=None, trim=None),
    "imsr-dir": IMSR(retain=replace(Retainer(), form="distance")),
    "imsr-kd1": IMSR(retain=replace(Retainer(), form="kd1")),
    "imsr-kd2": IMSR(retain=replace(Retainer(), form="kd2")),
    "imsr-kd3": IMSR(retain=replace(Retainer(), form="kd3", weight=1.0)),
}


ALIASES = {  # what papers call them, or 0.1.0 did -> what they are here
    "joint": "full",  # ADER
    "dropout": "finetune",  # ADER, where the model has dropout
    "asmg-gru-multi": "asmg",  # ASMG
    "rehearsed": "self-tuned",  # 0.1.0
}
FORMER = ("rehearsed",)  # aliases that are not a paper's: they print a warning
INTERFACE = Interface(Strategy, "update(state, span)")


def find_strategy(named: str | Strategy | type[Strategy]) -> Strategy:
    """The strategy that "imsr", "imsr:fit.epochs=5:retain.weight=1" or "their_package.module:Thing" names.

    An instance of one's own is returned as it is; of a class, an instance. OptionError for what is no strategy.
    """
    if isinstance(named, str):
        if (former := named.partition(":")[0]) in FORMER:
            warnings.warn(describe_rename(f"strategy {former}", ALIASES[former]), FutureWarning, stacklevel=2)
        return find_instance("strategy", named, STRATEGIES, INTERFACE, ALIASES)
    name = named.__name__ if isinstance(named, type) else type(named).__name__
    found: Strategy = as_instance("strategy", name, named, INTERFACE)
    return found
