"""Checks of strategies: the models that each can update, and the state that each update returns.

Replays and stores call `update` only through `next_state`, which checks the new state.
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

Requirement = Callable[[Any, str, str], str | None]  # (model, its name, the strategy's name) -> objection or None


def check_compatible(spec: ModelSpec, model_name: str, strategy: Strategy, strategy_name: str) -> None:
    """Raise IncompatibleError if the strategy cannot update the model.

    A strategy that is not in REQUIREMENTS may update any model. Errors in its `update` are reported unchanged.
    """
    model = build_model(spec, model_name)
    for kind, requirement in REQUIREMENTS.items():
        if isinstance(strategy, kind) and (reason := requirement(model, model_name, strategy_name)):
            raise IncompatibleError(reason)


def default_strategy(model: Any) -> str:
    """Return "refit" for the blend, "absorb" for other counting models, and "finetune" for trained models."""
    if isinstance(model, TrainedModel):
        return "finetune"
    return "refit" if isinstance(model, Blend) else "absorb"


def next_state(strategy: Strategy, state: State, span: Span) -> State:
    """Return the state after `strategy.update`. Raises OptionError if a replay or store cannot continue from it."""
    after: Any = strategy.update(state, span)
    call = f'update(state, span) of strategy "{type(strategy).__name__}"'
    if not isinstance(after, State):
        raise OptionError(f"{call} returned {after!r:.60}. It must return the next State.")
    if after.spans_seen != state.spans_seen + 1:
        raise OptionError(
            f"{call} returned a state with spans_seen={after.spans_seen}. It must be {state.spans_seen + 1}, "
            "one more than before. Call finish_update in freshrec/learn/fit.py, which sets it."
        )
    sizes, needed = (after.model.n_users, after.model.n_items), (span.n_users, span.n_items)
    if sizes != needed:
        raise OptionError(
            f"{call} returned a model with {sizes[0]} users and {sizes[1]} items, but the span has {needed[0]} and "
            f"{needed[1]}. Grow the model first, as grown_copy in freshrec/learn/fit.py does."
        )
    return after


def counters_only(model: Any, model_name: str, strategy_name: str) -> str | None:
    """Accept counting models, for strategies without gradient training."""
    if isinstance(model, TrainedModel):
        return (
            f'Strategy "{strategy_name}" trains nothing, and model "{model_name}" needs training. Use strategy frozen.'
        )
    return None


def blends_only(model: Any, model_name: str, strategy_name: str) -> str | None:
    """Accept blends, for strategies that combine experts."""
    if not isinstance(model, Blend):
        fitting = "finetune" if isinstance(model, TrainedModel) else "absorb"
        return (
            f'Strategy "{strategy_name}" updates only blends, and model "{model_name}" is not a blend. '
            f"Use strategy {fitting}, or model blend."
        )
    return None


def trained_models(model: Any, model_name: str, strategy_name: str) -> str | None:
    """Accept trained models, for strategies that use gradients."""
    if not isinstance(model, TrainedModel):
        strategies = "refit, or absorb, which uses the best expert alone" if isinstance(model, Blend) else "absorb"
        kind = "a blend" if isinstance(model, Blend) else "a counting model"
        return (
            f'Strategy "{strategy_name}" cannot train model "{model_name}", which is {kind}. Use strategy {strategies}.'
        )
    return None


def encoding_models(model: Any, model_name: str, strategy_name: str) -> str | None:
    """Accept models with item and user vectors, for strategies that need gradients of all scores."""
    if isinstance(model, TrainedModel) and not isinstance(model, EncodingModel):
        return (
            f'Strategy "{strategy_name}" needs a model that scores by user and item vectors. "{model_name}" does not. '
            "Use a model such as sasrec or comirec-dr."
        )
    return trained_models(model, model_name, strategy_name)


def interest_models(model: Any, model_name: str, strategy_name: str) -> str | None:
    """Accept models with several interests per user, for strategies that update interests."""
    if isinstance(model, TrainedModel) and not isinstance(model, InterestModel):
        return (
            f'Strategy "{strategy_name}" needs a model with several interests per user, and "{model_name}" has one '
            "vector. Use model mind, comirec-dr or comirec-sa."
        )
    return trained_models(model, model_name, strategy_name)


REQUIREMENTS: dict[type, Requirement] = {  # a custom strategy may add its own line
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
