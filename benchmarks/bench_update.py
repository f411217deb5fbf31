"""Cost of an IMSR update relative to fine-tuning, part by part, and of a full retrain relative to IMSR, at span 6.

    python benchmarks/bench_update.py           # one JSON line; CPU seconds of one thread, ratios within one run

Data, model and seed are the same. The strategies alternate over several rounds, and the medians are compared.
"""

import json
import statistics
import time
from dataclasses import replace

import torch

from freshrec.data.split import split_log
from freshrec.data.synthetic import make_world
from freshrec.learn.fit import FitConfig
from freshrec.models import MODELS
from freshrec.models.absorb import absorb_block
from freshrec.strategies.baselines import FineTune, Retrain
from freshrec.strategies.imsr import IMSR
from freshrec.types import Span, State, Strategy

ROUNDS = 5
FIT = FitConfig(epochs=2, base_epochs=2)
STRATEGIES: dict[str, Strategy] = {
    "finetune": FineTune(FIT),
    "eir alone": IMSR(detect=None, trim=None, fit=FIT),
    "imsr": IMSR(fit=FIT),
}


def seconds(strategy: Strategy, state: State, span: Span) -> tuple[float, dict[str, float]]:
    """CPU seconds of one update and of its parts."""
    since = time.process_time()
    after = strategy.update(state, span)
    return time.process_time() - since, after.costs


def main() -> None:
    """Replay to span 6 with IMSR, then time the update of each strategy there."""
    world = make_world("newborn", users=2000, items=4_000, events=120_000, spans=6)
    spans = split_log(world.log, by="period", spans=6).spans
    state = State(MODELS["comirec-dr"].build(0))
    for span in spans[:6]:
        state = STRATEGIES["imsr"].update(absorb_block(state, span.events, span.n_users, span.n_items), span)
    last = spans[6]
    ready = absorb_block(state, last.events, last.n_users, last.n_items)
    rounds = [{way: seconds(strategy, ready, last) for way, strategy in STRATEGIES.items()} for _ in range(ROUNDS)]
    cost = {way: statistics.median(r[way][0] for r in rounds) for way in STRATEGIES}
    parts = {
        k: statistics.median(r["imsr"][1][k] for r in rounds) for k in ("detect_cpu_s", "train_cpu_s", "extract_cpu_s")
    }
    past = tuple(span.events for span in spans[:6])
    full, _ = seconds(Retrain(fit=FIT), replace(ready, memory=past, base_epochs=FIT.base_epochs), last)
    out = {
        "benchmark": "update", "model": "comirec-dr", "epochs": FIT.epochs, "cpu_s": cost | {"full": full},
        "against_finetune": {way: round(cost[way] / cost["finetune"], 3) for way in STRATEGIES},
        "full_against_imsr": round(full / cost["imsr"], 1), "imsr_parts_cpu_s": parts,
        "nid_rate": rounds[0]["imsr"][1]["nid_rate"], "mean_k": rounds[0]["imsr"][1]["mean_k"],
    }  # fmt: skip
    print(json.dumps(out))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
