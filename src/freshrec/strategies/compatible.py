"""What can update what: the models that each strategy takes, and a sentence where it does not take one.

And what every update must return, checked in the one place where replay and store call `update`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from freshrec.errors import IncompatibleError, OptionError
from freshrec.models.blend.model import Blend
from freshrec.models.requirements import build_model
from freshrec.strategies.ader import ADER
from freshrec.strategies.ader_s import ADERS
from freshrec.strategies.asmg import ASMG
from freshrec.strategies.baselines import Absorb, FineTune, Frozen, Retrain
from freshrec.strategies.ewc import EWC
from freshrec.strategies.imsr import IMSR
from freshrec.strategies.incctr import IncCTR
from freshrec.strategies.refit import Refit
from freshrec.strategies.self_tuned import SelfTuned
from freshrec.strategies.sml import SML
from freshrec.strategies.spmf import SPMF
from freshrec.types import EncodingModel, InterestModel, ModelSpec, Span, State, Strategy, TrainedModel

Requirement = Callable[[Any, str, str], str | None]  # (model, its name, the strategy's name) -> why not; None: it fits


def check_compatible(spec: ModelSpec, model_name: str, strategy: Strategy, strategy_name: str) -> None:
    """Raise IncompatibleError, with a sentence, where this strategy cannot update this model.

    A strategy that REQUIREMENTS does not list may update any model; what its update raises is reported as it is.
    """
    model = build_model(spec, model_name)
    for kind, requirement in REQUIREMENTS.items():
        if isinstance(strategy, kind) and (reason := requirement(model, model_name, strategy_name)):
            raise IncompatibleError(reason)


def next_state(strategy: Strategy, state: State, span: Span) -> State:
    """What `strategy.update` returns. OptionError where that is no state that a replay or a store can go on from."""
    after: Any = strategy.update(state, span)
    call = f'update(state, span) of strategy "{type(strategy).__name__}"'
    if not isinstance(after, State):
        raise OptionError(f"{call} returned {after!r:.60}; it must return the next State.")
    if after.spans_seen != state.spans_seen + 1:
        raise OptionError(
            f"{call} returned a state with spans_seen={after.spans_seen}; it must be {state.spans_seen + 1}, "
            "one more than before, as finish_update in freshrec/learn/fit.py sets it."
        )
    sizes, needed = (after.model.n_users, after.model.n_items), (span.n_users, span.n_items)
    if sizes != needed:
        raise OptionError(
            f"{call} returned a model of {sizes[0]} users and {sizes[1]} items, and the span has {needed[0]} and "
            f"{needed[1]}; let the model grow, as grown_copy in freshrec/learn/fit.py does."
        )
    return after


def counters_only(model: Any, model_name: str, strategy_name: str) -> str | None:
    """For strategies without training."""
    if isinstance(model, TrainedModel):
        return f'"{strategy_name}" trains nothing, and "{model_name}" learns only by training: use frozen.'
    return None


def blends_only(model: Any, model_name: str, strategy_name: str) -> str | None:
    """For strategies that combine experts."""
    if not isinstance(model, Blend):
        fitting = "finetune" if isinstance(model, TrainedModel) else "absorb"
        return (
            f'"{strategy_name}" joins experts, and "{model_name}" has none: use it with blend. '
            f'A strategy for "{model_name}" is {fitting}.'
        )
    return None


def trained_models(model: Any, model_name: str, strategy_name: str) -> str | None:
    """For strategies that train by gradients."""
    if not isinstance(model, TrainedModel):
        strategies = "refit (or absorb, which trusts the best expert)" if isinstance(model, Blend) else "absorb"
        return f'"{model_name}" counts, it is not trained: its only strategy is {strategies}.'
    return None


def encoding_models(model: Any, model_name: str, strategy_name: str) -> str | None:
    """For strategies that need gradients of the scores of all items."""
    if isinstance(model, TrainedModel) and not isinstance(model, EncodingModel):
        return (
            f'"{strategy_name}" follows the scores of all items back to their vectors; "{model_name}" does not let it. '
            "Use a model with user and item vectors, such as sasrec or comirec-dr."
        )
    return trained_models(model, model_name, strategy_name)


def interest_models(model: Any, model_name: str, strategy_name: str) -> str | None:
    """For strategies that work on the interests of users."""
    if isinstance(model, TrainedModel) and not isinstance(model, InterestModel):
        return (
            f'"{strategy_name}" needs a model with several interests a user; "{model_name}" has one vector. '
            "Use mind, comirec-dr or comirec-sa."
        )
    return trained_models(model, model_name, strategy_name)


REQUIREMENTS: dict[type, Requirement] = {  # somebody else's strategy may add itself
    Absorb: counters_only,
    Refit: blends_only,
    Frozen: trained_models,
    FineTune: trained_models,
    Retrain: trained_models,
    SPMF: trained_models,
    IncCTR: trained_models,
    SML: trained_models,
    ASMG: trained_models,
    SelfTuned: trained_models,
    ADER: encoding_models,
    ADERS: encoding_models,
    EWC: encoding_models,
    IMSR: interest_models,
}
