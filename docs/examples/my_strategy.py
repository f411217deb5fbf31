"""A strategy of one's own: fine-tune, then move only part of the way, so that one odd day changes the model less.

Copy this file, change it, and name its class wherever freshrec takes the name of a strategy:

    export FRESHREC_IMPORT=my_strategy
    freshrec replay --world drift --models sasrec --strategies finetune,my_strategy:MyStrategy:keep=0.3
    freshrec fit events.parquet --store shop --model sasrec --strategy my_strategy:MyStrategy
    freshrec update tomorrow.parquet --store shop

The module is found in the current folder, or where Python finds others. FRESHREC_IMPORT names the modules that commands
import before they open a store; in Python, `import my_strategy` does the same.
"""

from dataclasses import dataclass

import torch

from freshrec.config import Rate, check_options
from freshrec.data.batches import due_targets
from freshrec.data.stored_interests import stored_interests_of
from freshrec.learn.fit import CostMeter, FitConfig, finish_update, fit_base_block, fit_model, grown_copy
from freshrec.learn.weights import copy_weights, load_weights
from freshrec.strategies.compatible import REQUIREMENTS, trained_models
from freshrec.types import Span, State


@dataclass(frozen=True)
class MyStrategy:
    """After each update, weights = keep * the previous weights + (1 - keep) * the fine-tuned ones."""

    keep: Rate = 0.5
    fit: FitConfig = FitConfig()  # epochs and learning rate of an update

    def __post_init__(self) -> None:
        check_options(self)

    def update(self, state: State, span: Span) -> State:
        """The state after the span; `state` itself stays as it was."""
        if state.spans_seen == 0:  # the base block: a new model
            return fit_base_block(state, span, self.fit)
        model = grown_copy(state, span)  # a copy of the model, with rows for new users and items
        targets = due_targets(state.histories, self.fit.history)  # the events that this update may train on
        interests = stored_interests_of(
            model, state.interests, span.index
        )  # of users, where the model keeps some; else None
        costs = CostMeter({"rows_read": float(len(targets))})
        fit_model(model, targets, self.fit, (state.seed, span.index), costs, stored_interests=interests)

        before, after = copy_weights(state.model), copy_weights(model)
        for name, old in before.items():
            after[name][: len(old)] = torch.lerp(after[name][: len(old)], old, self.keep)  # rows of new items stay
        load_weights(model, after)
        return finish_update(state, model, interests, self.fit.history, costs)


REQUIREMENTS[MyStrategy] = trained_models  # optional: counting models are refused with a sentence, before anything runs
