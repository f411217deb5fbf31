"""The text at the end of a replay: a table, the paired tests in words, and the next command.

No line has more than 100 columns, except for long names, and for tables on a terminal of less than 72 columns.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

from freshrec.models import CONTROLS
from freshrec.replay.answer import Answer, Difference, Method
from freshrec.replay.click_metrics import LOWER_IS_BETTER
from freshrec.replay.epochs import explain_reasons
from freshrec.replay.metrics import SAMPLED_SUFFIX
from freshrec.replay.plan import HasFit
from freshrec.replay.recipe_schema import LogRecipe
from freshrec.strategies.baselines import Frozen, Retrain
from freshrec.text_layout import WIDTH, format_count, wrap_lines
from freshrec.types import TrainedModel

MIN_TABLE_WIDTH = 72  # below it, a table has its natural width, because it would lose columns
UNLIMITED = 10_000  # columns
DEFAULT_MODEL, DEFAULT_STRATEGY = "blend", "refit"  # of `freshrec fit`
NO_BREAK = "\N{NO-BREAK SPACE}"
BLOCKS = re.compile(r" x(\d+)$")  # the end of a strategy's name in a replay with several blocks per span


def readable_strategy(strategy: str) -> str:
    """Return a strategy's name in words: "absorb, 3 blocks per span" for "absorb x3"."""
    return BLOCKS.sub(r", \1 blocks per span", strategy)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return the short form of each name: without options, unless two short forms would be equal."""
    unique = list(dict.fromkeys(names))
    bases = [_without_options(name) for name in unique]
    return {name: base if bases.count(base) == 1 else name for name, base in zip(unique, bases)}


def _without_options(name: str) -> str:
    """Return "absorb x3" for "absorb:a=1 x3"."""
    blocks = BLOCKS.search(name)
    return BLOCKS.sub("", name).partition(":")[0] + (blocks[0] if blocks else "")


@dataclass(frozen=True)
class Labels:
    """Names of methods in a text, without options if that is unambiguous."""

    models: dict[str, str]
    strategies: dict[str, str]

    @staticmethod
    def of(methods: Iterable[Method]) -> Labels:
        """The labels of all methods of a replay."""
        models, strategies = zip(*methods)
        return Labels(short_names(models), short_names(strategies))

    def model(self, method: Method) -> str:
        """The model's name."""
        return self.models[method[0]]

    def strategy(self, method: Method) -> str:
        """The strategy's name."""
        return readable_strategy(self.strategies[method[1]])

    def __getitem__(self, method: Method) -> str:
        """Model and strategy, such as "comirec-dr with imsr"; only the model if the strategy is absorb."""
        model, strategy = self.model(method), self.strategies[method[1]]
        if blocks := BLOCKS.search(strategy):
            strategy, model = BLOCKS.sub("", strategy), f"{model} ({blocks[1]} blocks per span)"
        return model if strategy == "absorb" else f"{model} with {strategy}"

    def name_relative_to(self, reference: Method, method: Method) -> str:
        """The method's name in a text about `reference`: only the strategy if the model is the same."""
        return self.strategy(method) if method[0] == reference[0] else self[method]

    def shortened(self) -> list[str]:
        """The full form of each shortened name, such as "mf = mf:d=8"."""
        both = {**self.models, **self.strategies}
        return [f"{short} = {name}" for name, short in both.items() if short != name]


def format_p(p: float) -> str:
    """Return a p-value, such as "p = 0.012" or "p < 0.001", with non-breaking spaces."""
    return ("p < 0.001" if p < 0.0005 else f"p = {p:.3f}").replace(" ", NO_BREAK)


def format_change(value: float) -> str:
    """Return a difference with its sign and 4 digits."""
    return f"{value:+.4f}".replace("-0.0000", "+0.0000")


def format_seconds(seconds: float) -> str:
    """Return seconds with one decimal below 100, and without decimals from 100 on. Less than 0.05 s is "<0.1"."""
    if seconds < 0.05:
        return "<0.1" if seconds > 0 else "0"
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"


def output_width() -> int:
    """Return the width of the terminal, at most 100 columns; 100 if the output is not a terminal."""
    return min(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH


def wrap(text: str, width: int, indent: str = "") -> str:
    """Wrap a text at `width` columns. A word longer than a line stays whole."""
    return "\n".join(wrap_lines(text, width, rest=indent)).replace(NO_BREAK, " ")


def render_table(answer: Answer, width: int = WIDTH) -> str:
    """Return the table and a legend, as plain text of at most `width` columns. See `table_lines` for narrow tables.

    The epochs are a column. On a terminal that is too narrow for it, they are in the legend.
    """
    labels = Labels.of(answer.cells)
    has_epochs = any(row.epochs for row in answer.summaries)
    table = _table(answer, labels, has_epochs)
    if MIN_TABLE_WIDTH <= width < WIDTH and has_epochs and max(map(len, table_lines(table, 0))) > width:
        has_epochs, table = False, _table(answer, labels, has_epochs=False)
    legend = [wrap(line, width) for line in _legend(answer, labels, has_epochs)]
    return "\n".join([*table_lines(table, width), "", *legend])


def _table(answer: Answer, labels: Labels, has_epochs: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("model", "strategy"):
        table.add_column(head, overflow="fold")
    has_forgetting = answer.has_forgetting
    numbers = [SAMPLED_SUFFIX.sub("", answer.metric), "difference", "p", *["forgetting"] * has_forgetting]
    for head in [*numbers, *["epochs"] * has_epochs, "CPU-s"]:
        table.add_column(head, justify="right", no_wrap=True)
    for row in answer.summaries:
        gain = answer.gain(row.method)
        cells = [f"{row.value:.4f} ± {(row.high - row.low) / 2:.4f}"]
        if gain is not None:
            cells += [format_change(gain.value), format_p(gain.p).replace(NO_BREAK, "").lstrip("p=")]
        else:
            cells += ["reference" if row.method in answer.references.values() else "", ""]
        if has_forgetting:
            cells.append("" if row.forgetting is None else format_change(row.forgetting))
        if has_epochs:
            cells.append("" if row.epochs is None else row.epochs.short)
        cells.append("" if row.cpu_s is None else format_seconds(row.cpu_s))
        table.add_row(labels.model(row.method), labels.strategy(row.method), *cells)
    return table


def table_lines(table: Table, width: int) -> list[str]:
    """Return the lines of a table, without spaces at their ends. Below 72 columns, the table has its natural width."""
    text, width = StringIO(), width if width >= MIN_TABLE_WIDTH else UNLIMITED
    Console(file=text, width=width, color_system=None, highlight=False, markup=False).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def _legend(answer: Answer, labels: Labels, has_epochs: bool) -> list[str]:
    """Return a line about each column."""
    direction = "lower" if answer.metric in LOWER_IS_BETTER else "higher"
    lines = [f"{answer.metric}: mean over spans, {direction} is better; ± is half of the 95 % interval over users."]
    if compared := _describe_references(answer, labels):
        lines.append(f"difference: from {compared}; positive = better.")
        lines.append(f"p: paired test over users, corrected for {format_count(answer.n_pairs, 'comparison')}.")
    if answer.has_forgetting:
        lines.append(
            f"forgetting: loss of {answer.metric} on held-out events of earlier spans, after the last update; "
            "positive = lost."
        )
    lines += _describe_epochs(answer, labels, has_epochs)
    lines.append("CPU-s: processor seconds per update, without measuring.")
    shortened = labels.shortened()
    return [*lines, *[f"Options: {', '.join(shortened)}."] * bool(shortened)]


def _describe_epochs(answer: Answer, labels: Labels, has_column: bool) -> list[str]:
    """Explain the epochs of the table, or list them if the table has no column for them."""
    trained = {row.method: row.epochs for row in answer.summaries if row.epochs}
    if not trained:
        return []
    text = "epochs: mean number per update, and what set it."
    if not has_column:
        methods: dict[str, list[str]] = {}
        for method, epochs in trained.items():
            methods.setdefault(epochs.long, []).append(labels[method])
        parts = [f"{epochs} {', '.join(names)}" for epochs, names in methods.items()]
        text = f"epochs per update: {'; '.join(parts)}."
    strategies = [(epochs, answer.cells[method].strategy_instance) for method, epochs in trained.items()]
    fits = [(epochs, strategy.fit) for epochs, strategy in strategies if isinstance(strategy, HasFit)]
    return [f"{text} {explain_reasons(fits, is_mixed_shown=has_column)}"]


def _describe_references(answer: Answer, labels: Labels) -> str:
    """Name the references of the differences in the table; "" for a single method."""
    pairs = [(a, b) for a, b in answer.references.items() if a != b]
    references = list(dict.fromkeys(b for _, b in pairs))
    if len(references) < 2:
        return " or ".join(labels[reference] for reference in references)
    text = " or ".join(dict.fromkeys(labels.strategy(reference) for reference in references)) + " of the same model"
    others = dict.fromkeys(labels[b] for a, b in pairs if a[0] != b[0])
    return f"{text}, and from {' or '.join(others)} for all other models" if others else text


def describe_tests(answer: Answer) -> list[str]:
    """Describe the paired tests: the methods that are better, worse or within chance, for each reference."""
    labels = Labels.of(answer.cells)
    lines = []
    for reference in dict.fromkeys(answer.references[row.method] for row in answer.summaries):
        gains = {
            row.method: gain
            for row in answer.summaries
            if answer.references[row.method] == reference and (gain := answer.gain(row.method)) is not None
        }
        groups = {
            "Better beyond chance": [m for m, gain in gains.items() if gain.is_beyond_chance and gain.value > 0],
            "Worse beyond chance": [m for m, gain in gains.items() if gain.is_beyond_chance and gain.value < 0],
            "Within chance": [m for m, gain in gains.items() if not gain.is_beyond_chance],
        }
        parts = [
            f"{name}: {', '.join(f'{labels.name_relative_to(reference, m)} ({_numbers(gains[m])})' for m in methods)}."
            for name, methods in groups.items()
            if methods
        ]
        if parts:
            lines.append(f"Against {labels[reference]}. {' '.join(parts)}")
    return lines


def _numbers(difference: Difference) -> str:
    return f"{format_change(difference.value)}, {format_p(difference.p)}"


def _verdict(difference: Difference) -> str:
    return "beyond chance" if difference.is_beyond_chance else "within chance"


def describe_answer(answer: Answer) -> list[str]:
    """Describe the best method, its gain, its cost and the method to use, in two to four short paragraphs."""
    labels = Labels.of(answer.cells)
    lines = [
        _describe_best(answer, labels),
        _describe_gain(answer, labels),
        _describe_best_trained(answer, labels),
        _describe_cost(answer, labels),
    ]
    return [line for line in lines if line]


def _describe_best(answer: Answer, labels: Labels) -> str:
    best = answer.best
    kind = " (a control)" if best.method[0] in CONTROLS else ""
    text = f"Best on this log: {labels[best.method]}{kind}, {answer.metric} {best.value:.4f}."
    others = answer.summaries[1:]
    if answer.has_no_winner:
        names = {1: labels[others[0].method], 2: "both others"}
        rivals = names.get(len(others), f"all {len(others)} others")
        return f"{text} Its lead over {rivals} is within chance, so there is no winner."
    if len(others) == 1:
        return f"{text} Its lead over {labels[others[0].method]} is beyond chance."
    if others and not answer.n_ties:
        return f"{text} It is better than all others beyond chance."
    return f"{text} Its lead over {answer.n_ties} of the {len(others)} others is within chance." if others else text


def _describe_gain(answer: Answer, labels: Labels) -> str:
    """Describe the gain of the best method over its reference. For a reference, describe its gain over no update."""
    best = answer.best.method
    gain, reference = answer.gain(best), answer.references[best]
    cells = answer.cells.items()
    frozen = [method for method, cell in cells if method[0] == best[0] and isinstance(cell.strategy_instance, Frozen)]
    if best in frozen:
        if any(method[0] == best[0] and method not in frozen for method in answer.cells):
            return f"That model is not updated at all: no update of {labels.model(best)} was better on this log."
        return f"That model is not updated at all. No update of {labels.model(best)} was run."
    if gain is not None:
        base = answer.summary(reference).value
        share = f" ({100 * gain.value / base:+.0f} %)" if base > 0 else ""
        text = f"Compared with {labels[reference]} it gains {format_change(gain.value)}{share}, {_verdict(gain)}."
        rivals = [answer.gain(row.method) for row in answer.summaries if answer.references[row.method] == reference]
        has_winner = any(rival is not None and rival.is_beyond_chance and rival.value > 0 for rival in rivals)
        return text if has_winner else f"{text} Nothing is better than {labels[reference]} beyond chance."
    text = f"No other run is better than {labels[best]}."
    over = answer.differences.get((best, frozen[0])) if frozen else None
    if over is not None:
        text += f" Compared with no update at all it gains {format_change(over.value)}, {_verdict(over)}."
    return text


def _describe_best_trained(answer: Answer, labels: Labels) -> str:
    """Describe the best trained model, if a counting model is best."""
    best = answer.best
    trained = [row for row in answer.summaries if _is_trained(answer, row.method)]
    if _is_trained(answer, best.method) or not trained:
        return ""
    gap = answer.differences.get((trained[0].method, best.method))
    numbers = "" if gap is None else f" ({format_change(gap.value)}, {_verdict(gap)})"
    return (
        f"{labels.model(best.method)} is a counting model. The best trained model is {labels[trained[0].method]}, "
        f"{answer.metric} {trained[0].value:.4f}{numbers}."
    )


def _is_trained(answer: Answer, method: Method) -> bool:
    return isinstance(answer.cells[method].model_spec.build(0), TrainedModel)


def _describe_cost(answer: Answer, labels: Labels) -> str:
    """Describe the cost of an update, and recommend a cheaper method if the lead is within chance."""
    best, chosen = answer.best.method, answer.chosen()
    retrains = [
        m for m, cell in answer.cells.items() if m[0] == best[0] and isinstance(cell.strategy_instance, Retrain)
    ]
    costs = [
        f"{labels[method]} {format_seconds(answer.cpu_s(method))} CPU-s"
        for method in dict.fromkeys([best, answer.references[best], *retrains])
    ]
    text = f"Cost of an update: {', '.join(costs)}."
    if answer.has_no_winner or chosen == best:
        return text
    return f"{text} {labels[chosen]} costs less and may be as good: use it."


def fit_command(log: LogRecipe, method: Method | None) -> list[str]:
    """Return the command that makes a store from the log of a replay, with the default model if `method` is None."""
    path = str(Path(log.folder) / log.path) if log.path else "LOG"
    words = ["freshrec", "fit", path]
    if method is not None:
        model, strategy = method
        words += ["--model", model, "--strategy", BLOCKS.sub("", strategy)]
    words += ["--store", "shop"]
    if log.columns:
        words += ["--columns", ",".join(f"{name}={column}" for name, column in log.columns.items())]
    if log.format:
        words += ["--format", log.format]
    if log.events:
        words += ["--events", ",".join(log.events)]
    return words + (["--until", log.until] if log.until else [])


def render_command(words: Sequence[str], width: int = WIDTH) -> str:
    """Format a command for copying. Lines that are too long continue after a backslash."""
    quoted = [shlex.quote(word) for word in words]
    parts = re.split(r" (?=--)", " ".join(quoted))  # an option and its value stay on one line
    lines = [f"  {parts[0]}"]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}"
    return "\n".join(lines)


def render_answer(answer: Answer, log: LogRecipe, width: int = WIDTH, from_span: int = 1) -> str:
    """Return the whole text at the end of a replay. `from_span`: first span of the means and tests."""
    if not answer.summaries:
        return "No run of this replay was tested on a target. Use more spans or a lower --min-history."
    parts = [render_table(answer, width)]
    if from_span > 1:
        start = (
            f"Means and tests start at span {from_span}. In span 1, all strategies have the model of the base block."
        )
        parts[0] += "\n" + wrap(start, width)
    if tests := describe_tests(answer):
        parts.append("\n".join(["Paired tests", *(wrap(f"- {line}", width, "  ") for line in tests)]))
    parts.append("\n".join(["What it shows", *(wrap(f"- {line}", width, "  ") for line in describe_answer(answer))]))
    if log.exposures:
        parts.append(wrap("A store keeps no exposures, so `freshrec fit` cannot learn from them yet.", width))
    else:
        parts.append(_next_step(answer, log, width))
    return "\n\n".join(parts)


def _next_step(answer: Answer, log: LogRecipe, width: int) -> str:
    """Return the command that makes a store: with the chosen method, or with the default if there is no winner."""
    hint = "" if log.path else " (LOG is your own log)"
    if not answer.has_no_winner:
        return f"Next{hint}:\n{render_command(fit_command(log, answer.chosen()), width)}"
    text = f"Next, with the default model{hint}:\n{render_command(fit_command(log, None), width)}"
    if any(_without_options(model) == DEFAULT_MODEL for model, _ in answer.cells):
        return text
    advice = (
        f"The default model, {DEFAULT_MODEL}, was not compared. To add it to this replay, repeat the command with "
        f"--resume --extra-pairs {DEFAULT_MODEL}/{DEFAULT_STRATEGY}."
    )
    return f"{text}\n{wrap(advice, width)}"
