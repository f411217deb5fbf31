"""What an IMSR update costs against fine-tuning, part by part, and a full retrain against it at span 6.

    python benchmarks/bench_update.py           # one JSON line; CPU seconds of one thread, ratios within one run

Per epoch the same data, model and seed; the two are run in turn, several times, and the median of each is compared.
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
WAYS: dict[str, Strategy] = {
    "finetune": FineTune(FIT),
    "eir alone": IMSR(detect=None, trim=None, fit=FIT),
    "imsr": IMSR(fit=FIT),
}


def seconds(strategy: Strategy, state: State, span: Span) -> tuple[float, dict[str, float]]:
    """CPU seconds of one update, and of its parts."""
    since = time.process_time()
    after = strategy.update(state, span)
    return time.process_time() - since, after.costs


def main() -> None:
    """Replay to span 6 with each way, then time its update there."""
    world = make_world("newborn", users=2000, items=4_000, events=120_000, spans=6)
    spans = split_log(world.log, by="period", spans=6).spans
    state = State(MODELS["comirec-dr"].build(0))
    for span in spans[:6]:
        state = WAYS["imsr"].update(absorb_block(state, span.events, span.n_users, span.n_items), span)
    last = spans[6]
    ready = absorb_block(state, last.events, last.n_users, last.n_items)
    rounds = [{way: seconds(strategy, ready, last) for way, strategy in WAYS.items()} for _ in range(ROUNDS)]
    cost = {way: statistics.median(r[way][0] for r in rounds) for way in WAYS}
    parts = {
        k: statistics.median(r["imsr"][1][k] for r in rounds) for k in ("detect_cpu_s", "train_cpu_s", "extract_cpu_s")
    }
    past = tuple(span.events for span in spans[:6])
    full, _ = seconds(Retrain(fit=FIT), replace(ready, memory=past, base_epochs=FIT.base_epochs), last)
    out = {
        "benchmark": "update", "model": "comirec-dr", "epochs": FIT.epochs, "cpu_s": cost | {"full": full},
        "against_finetune": {way: round(cost[way] / cost["finetune"], 3) for way in WAYS},
        "full_against_imsr": round(full / cost["imsr"], 1), "imsr_parts_cpu_s": parts,
        "nid_rate": rounds[0]["imsr"][1]["nid_rate"], "mean_k": rounds[0]["imsr"][1]["mean_k"],
    }  # fmt: skip
    print(json.dumps(out))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
