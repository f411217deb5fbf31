"""A custom strategy: fine-tune, then average with the previous weights, so that one unusual day changes less.

Copy this file, change it, and use the name of its class wherever freshrec takes a strategy:

    export FRESHREC_IMPORT=my_strategy
    freshrec replay --world drift --models sasrec --strategies finetune,my_strategy:MyStrategy:keep=0.3 --out runs/mine
    freshrec fit events.parquet --store my-strategy-shop --model sasrec --strategy my_strategy:MyStrategy
    freshrec update tomorrow.parquet --store my-strategy-shop
    freshrec recommend u42 --store my-strategy-shop
    freshrec serve --store my-strategy-shop

The current folder is searched for the module too. A store holds the name of the class, but not its code. So
FRESHREC_IMPORT names the modules to import before a store is opened. The option `--allow-import my_strategy` does
the same for one command. In Python, write `import my_strategy` instead.
"""

from dataclasses import dataclass

from freshrec.config import Rate, check_options
from freshrec.data.batches import due_targets
from freshrec.data.stored_interests import stored_interests_of
from freshrec.learn.fit import CostMeter, FitConfig, finish_update, fit_base_block, fit_model, grown_copy
from freshrec.learn.weights import Weights, copy_weights, load_weights
from freshrec.strategies.compatible import REQUIREMENTS, trained_models
from freshrec.types import Span, State


@dataclass(frozen=True)
class MyStrategy:
    """After each update, weights = keep * previous weights + (1 - keep) * fine-tuned weights."""

    keep: Rate = 0.5  # Weight of the previous weights. 0 = fine-tuning.
    fit: FitConfig = FitConfig()  # How the model is trained.

    def __post_init__(self) -> None:
        check_options(self)

    def update(self, state: State, span: Span) -> State:
        """Return the state after the span. `state` itself does not change."""
        if state.spans_seen == 0:  # the first update trains a new model
            return fit_base_block(state, span, self.fit)
        model = grown_copy(state, span)  # with rows for the span's new users and items
        targets = due_targets(state.histories, self.fit.history)  # the events to train on
        interests = stored_interests_of(model, state.interests, span.index)  # None if the model stores none
        meter = CostMeter({"rows_read": float(len(targets))})
        fit_model(model, targets, self.fit, (state.seed, span.index), meter, stored_interests=interests)
        load_weights(model, average_weights(copy_weights(state.model), copy_weights(model), self.keep))
        return finish_update(state, model, interests, self.fit.history, meter)


def average_weights(previous: Weights, tuned: Weights, keep: float) -> Weights:
    """keep * previous + (1 - keep) * tuned, written into `tuned`. Rows of new users and items keep their values."""
    for name, weight in previous.items():
        known = tuned[name][tuple(slice(size) for size in weight.shape)]  # a view without the new rows
        known.lerp_(weight, keep)
    return tuned


REQUIREMENTS[MyStrategy] = trained_models  # optional: refuse counting models before the log is read
