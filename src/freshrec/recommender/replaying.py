"""`Recommender.replay`: compare a recommender's way of updating with others on a log of the past."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from freshrec.config import name_of
from freshrec.data.duplicates import drop_duplicates
from freshrec.data.log import Log, keep_positives
from freshrec.data.split import LogSplit, split_log
from freshrec.data.split_config import SplitConfig
from freshrec.errors import IncompatibleError, OptionError
from freshrec.models import COUNTING_MODELS, MODELS, find_model
from freshrec.progress import Progress, listen
from freshrec.recommender.bundle import Bundle
from freshrec.recommender.log_reading import LogSource, read_interactions
from freshrec.recommender.progress import ProgressOption, check_progress
from freshrec.replay.answer import Answer, headline_metric, read_answer
from freshrec.replay.cell import Cell, ReplaySettings
from freshrec.replay.progress import ProgressBoard
from freshrec.replay.recipe_schema import FIRST_UPDATED_SPAN, Recipe, ReplayRecipe
from freshrec.replay.recipes import make_replay_settings
from freshrec.replay.results import collect_results
from freshrec.replay.runner import run_cells
from freshrec.replay.slices import slice_table
from freshrec.strategies import STRATEGIES, find_strategy
from freshrec.strategies.compatible import check_compatible, default_strategy
from freshrec.types import ModelSpec, Strategy

if TYPE_CHECKING:
    from freshrec.recommender.recommender import Recommender

ModelLike = str | ModelSpec | type[ModelSpec]
StrategyLike = str | Strategy | type[Strategy]
NamedModel = tuple[str, ModelSpec]
NamedStrategy = tuple[str, Strategy]


def replay_recommender(
    recommender: Recommender,
    log: LogSource | Log,
    *,
    models: Sequence[ModelLike] = (),
    strategies: Sequence[StrategyLike] | None = None,
    controls: Sequence[str] = (),
    split: SplitConfig | None = None,
    metrics: str | Sequence[str] = ReplayRecipe.metrics,
    seeds: int = 1,
    out: str | Path | None = None,
    jobs: int = 1,
    progress: ProgressOption = False,
) -> Answer:
    """Test this model and strategy, and alternatives, span by span on a log of the past.

    Each method starts from an untrained model. The recommender itself does not change, and what it has learned has no
    effect. The answer is that of `freshrec replay` with the same options: see `answer.best` and `answer.frame()`.

    - `log`: a file or a frame, read with the options of `fit`, or the result of `read_log`.
    - `models`, `strategies`: the alternatives, as names, classes or instances. Each model, the own one too, is updated
      by all strategies that can update it, or else by its default strategy. The default strategies are those of
      `freshrec replay`.
    - `controls`: names of baselines, such as "popularity" and "item-knn".
    - `split`: how the log is cut into spans. `seeds`: number of runs of each trained model.
    - `out`: a folder that keeps the results, so that a second call continues. By default they are deleted.
    - `jobs`: number of processes. `progress`: True shows progress on stderr; a function gets each `Progress`.

    Raises LogError for a bad log, SpanError if it cannot be split, OptionError for an unknown name, and
    IncompatibleError for a strategy that can update none of the models.
    """
    check_progress(progress)
    bundle = recommender._bundle
    seed = bundle.served.state.seed
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    settings = make_replay_settings(Recipe(replay=ReplayRecipe(metrics=metrics, seeds=seeds)))
    cells = [
        Cell(*model, *strategy, seed + n)
        for model, strategy in _methods(bundle, models, strategies, controls)
        for n in range(1 if model[0].partition(":")[0] in COUNTING_MODELS else seeds)
    ]
    if not isinstance(log, Log):
        log = read_interactions(log, bundle.read_options)
    spans = split_log(drop_duplicates(keep_positives(log)), split, seed=seed)
    folder = nullcontext(str(out)) if out is not None else TemporaryDirectory(prefix="freshrec-replay-")
    with folder as path:
        return _run(cells, spans, settings, metrics, Path(path), jobs, progress)


def _run(
    cells: list[Cell],
    split: LogSplit,
    settings: ReplaySettings,
    metrics: tuple[str, ...],
    out: Path,
    jobs: int,
    progress: ProgressOption,
) -> Answer:
    """Run all cells, collect their results in `out`, and return the answer."""
    spans = [span.index for span in split.spans[1:]]
    metric = headline_metric(metrics)
    out.mkdir(parents=True, exist_ok=True)
    n_threads = torch.get_num_threads()  # a run sets it to 1
    try:
        with _span_reports(cells, spans, out, metric, progress) as report_span, listen(None):
            run_cells(cells, split, settings, out, jobs=jobs, on_span_done=report_span)
    finally:
        torch.set_num_threads(n_threads)
    from_span = min(FIRST_UPDATED_SPAN, spans[-1])
    collect_results(cells, slice_table(split.spans), metrics, out, from_span=from_span)
    return read_answer(cells, out, metric)


@contextmanager
def _span_reports(
    cells: list[Cell], spans: list[int], out: Path, metric: str, progress: ProgressOption
) -> Iterator[Callable[[Cell, int], None]]:
    """Yield a function to call with a run and the span that it has finished."""
    if progress is True:
        board = ProgressBoard(cells, spans, out, Console(stderr=True), metric)
        with board.live():
            yield board.report_span
        return
    numbers, total = count(1), len(cells) * (len(spans) + 1)

    def report(cell: Cell, span: int) -> None:
        if callable(progress):
            detail = f"{cell.model_name}, {cell.strategy_name}, seed {cell.seed}, span {span}"
            progress(Progress("replaying", next(numbers), total, detail))

    yield report


def _methods(
    bundle: Bundle,
    models: Sequence[ModelLike],
    strategies: Sequence[StrategyLike] | None,
    controls: Sequence[str],
) -> list[tuple[NamedModel, NamedStrategy]]:
    """Return the methods to compare, each once: the own one, each model with each strategy, and the controls."""
    own_model: NamedModel = (bundle.names[0], bundle.served.state.model.spec)
    chosen = [_named_strategy(name) for name in (ReplayRecipe.strategies if strategies is None else strategies)]
    found = [(own_model, (bundle.names[1], bundle.strategy))]
    fitting, problems = set[str](), dict[str, IncompatibleError]()
    for model in (own_model, *map(_named_model, models)):
        pairs = []
        for strategy in chosen:
            try:
                check_compatible(model[1], model[0], strategy[1], strategy[0])
                pairs.append((model, strategy))
                fitting.add(strategy[0])
            except IncompatibleError as problem:
                problems.setdefault(strategy[0], problem)
        found += pairs or [(model, _named_strategy(default_strategy(model[1].build(0))))]
    for name, reason in problems.items():
        if strategies is not None and name not in fitting:
            raise reason
    found += [(_named_model(name), _named_strategy("absorb")) for name in controls]
    unique: dict[tuple[str, str], tuple[NamedModel, NamedStrategy]] = {}
    for method in found:
        names = method[0][0], method[1][0]
        if unique.setdefault(names, method) != method:
            raise OptionError(f'Two different methods are called "{names[0]}, {names[1]}". Replay them one by one.')
    return list(unique.values())


def _named_model(model: ModelLike) -> NamedModel:
    spec = find_model(model)
    return (model if isinstance(model, str) else name_of(spec, MODELS), spec)


def _named_strategy(strategy: StrategyLike) -> NamedStrategy:
    found = find_strategy(strategy)
    return (strategy if isinstance(strategy, str) else name_of(found, STRATEGIES), found)
