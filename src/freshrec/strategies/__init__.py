"""Strategies by name. A variant is another instance of its class. In an ablation, one part is None."""

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

# Name: the strategy, and one sentence on what is different about it, for `freshrec list` and docs/reference.md.
STRATEGY_TABLE: dict[str, tuple[Strategy, str]] = {
    "absorb": (Absorb(), "No gradient training. For counting models, which count the new events."),
    "refit": (Refit(), "For the blend: fit the expert weights again, then train the trained expert."),
    "frozen": (Frozen(), "No training after the base block. New users and items get untrained vectors."),
    "finetune": (FineTune(), "Continue training the previous model on the new events."),
    "finetune-span": (FineTune(fit=SPAN_ONLY), "Fine-tuning that reads only histories of the new span."),
    "full": (Retrain(), "Train a new model from scratch on all events so far."),
    "full-warm": (Retrain(from_scratch=False), "Train the previous model on all events so far."),
    "batch-3": (Retrain(from_scratch=False, spans=3), "Train the previous model on the events of the last 3 spans."),
    "batch-5": (Retrain(from_scratch=False, spans=5), "Train the previous model on the events of the last 5 spans."),
    "batch-7": (Retrain(from_scratch=False, spans=7), "Train the previous model on the events of the last 7 spans."),
    "ewc": (EWC(), "Fine-tuning with a penalty on changes of important weights (Fisher information)."),
    "spmf": (SPMF(), "Fine-tuning on a sample of new and past events that favours poorly ranked ones."),
    "spmf-all": (SPMF(take="all"), "Fine-tuning on all new events and a sample of past ones."),
    "incctr": (IncCTR(), "Fine-tuning with distillation from the previous model (KD-self)."),
    "er-random": (ADER(distil=False, select="random"), "Experience replay. Random exemplars, no distillation."),
    "er-loss": (ADER(distil=False, select="loss"), "Experience replay. Exemplars of smallest loss, no distillation."),
    "er-herding": (ADER(distil=False), "Experience replay. Exemplars chosen by herding, no distillation."),
    "ader": (ADER(), "Exemplars chosen by herding, with distillation of adaptive weight."),
    "ader-equal": (
        ADER(equal=True, allocate="multinomial"),
        "ADER that draws exemplars of each item with equal probability.",
    ),
    "ader-fix": (ADER(adaptive=False), "ADER with a fixed distillation weight."),
    "ader-s": (ADERS(), "Replay of each active user's past sequences that resemble the new events."),
    "sml": (SML(), "A trained transfer network (CNN) merges the previous and the adapted weights."),
    "sml-5x5": (
        SML(transfer=CNNTransfer(filters=10, filters2=10, hidden=40, kernel="5x5")),
        "SML with a 5x5 kernel, as in the IMSR paper's comparison.",
    ),
    "sml-linear": (
        SML(transfer=LinearTransfer(learned=True)),
        "SML that mixes old and adapted weights by one learned number per tensor.",
    ),
    "sml-mlp": (SML(transfer=MLPTransfer()), "SML with a multilayer perceptron as transfer network."),
    "sml-no-cnn": (SML(transfer=CNNTransfer(filters=0)), "SML without convolutions in the transfer network."),
    "sml-no-fc": (SML(transfer=CNNTransfer(hidden=0)), "SML without fully connected layers in the transfer network."),
    "sml-n": (SML(objective="current"), "SML whose transfer network is trained on the current span, not the next one."),
    "sml-s": (
        SML(last_trained_span=0, fit=FitConfig(epochs=2)),
        "SML whose transfer network is no longer trained after the base block.",
    ),
    "sml-fp": (
        SML(train_through_transfer=False),
        "SML that adapts the weights by plain fine-tuning, not through the network.",
    ),
    "asmg": (ASMG(), "A recurrent generator (GRU) makes the served weights from the last 3 models."),
    "asmg-gru-single": (ASMG(loss="last"), "ASMG whose generator is trained on the newest span only."),
    "asmg-gru-full": (ASMG(k=0, carry=False), "ASMG whose generator reads all models since the base block."),
    "asmg-gru-zero": (ASMG(carry=False), "ASMG whose generator starts each window from a hidden state of 0."),
    "asmg-gru-unif": (ASMG(loss="uniform"), "ASMG whose generator is trained with equal weight on each span."),
    "asmg-linear": (
        ASMG(generator="linear", loss="last"),
        "ASMG with a learned weighted mean of the last 3 models instead of the GRU.",
    ),
    "self-tuned": (SelfTuned(), "Fine-tuning with settings chosen by a simulation on the base block."),
    "imsr": (IMSR(), "Retains existing interests, detects new ones and trims redundant ones."),
    "imsr-span": (IMSR(fit=SPAN_ONLY), "IMSR that reads only histories of the new span, as its paper does."),
    "imsr-no-eir": (IMSR(retain=None), "IMSR without the existing-interests retainer."),
    "imsr-no-expansion": (IMSR(detect=None, trim=None), "IMSR without detector and trimmer. Users gain no interests."),
    "imsr-dir": (
        IMSR(retain=replace(Retainer(), form="distance")),
        "IMSR that retains by the Euclidean distance to the stored interests.",
    ),
    "imsr-kd1": (
        IMSR(retain=replace(Retainer(), form="kd1")),
        "IMSR that retains by a softmax over a user's interests, as in LwF.",
    ),
    "imsr-kd2": (
        IMSR(retain=replace(Retainer(), form="kd2")),
        "IMSR that retains by a softmax over the cosines of a user's interests.",
    ),
    "imsr-kd3": (
        IMSR(retain=replace(Retainer(), form="kd3", weight=1.0)),
        "IMSR that retains as kd1, weighted by the share of old interests, as in BiC.",
    ),
}
STRATEGIES = {name: strategy for name, (strategy, _) in STRATEGY_TABLE.items()}

ALIASES = {  # names in papers and former names -> names here
    "joint": "full",  # ADER
    "dropout": "finetune",  # ADER, for models with dropout
    "asmg-gru-multi": "asmg",  # ASMG
    "rehearsed": "self-tuned",  # 0.1.0
}
FORMER = ("rehearsed",)  # names of earlier versions, which print a warning
INTERFACE = Interface(Strategy, "update(state, span)")


def find_strategy(named: str | Strategy | type[Strategy]) -> Strategy:
    """Return the strategy called "imsr", "imsr:fit.epochs=5:retain.weight=1" or "their_package.module:Thing".

    An instance is returned unchanged. A class is instantiated. Raises OptionError for anything else.
    """
    if isinstance(named, str):
        if (former := named.partition(":")[0]) in FORMER:
            warnings.warn(describe_rename(f"strategy {former}", ALIASES[former]), FutureWarning, stacklevel=2)
        return find_instance("strategy", named, STRATEGIES, INTERFACE, ALIASES)
    name = named.__name__ if isinstance(named, type) else type(named).__name__
    found: Strategy = as_instance("strategy", name, named, INTERFACE)
    return found
