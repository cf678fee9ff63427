"""The tables of the comparison on characters."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from dflows.errors import UserError
from dflows.records import Record
from experiments.plan import Goal, Row
from experiments.reports.curves import bits
from experiments.reports.experiment import Experiment, setting
from experiments.reports.markdown import number, table

__all__ = ["render"]

ARCHIVE = "archive, bpc"
HEAD = (
    "system",
    "published bpc",
    "published, s",
    "test bpc, windows",
    ARCHIVE,
    "test bpc, stateful",
    "importance-weighted",
    "passes",
    "fixed point, iterations",
    "parameters",
    "trained, s",
    "1 sequence, s",
    "32 sequences, s",
)
SIGNS = {"\n": "↵", "\r": "␍"}


class Shown(NamedTuple):
    """A row by its name, and the record that stands for it."""

    name: str
    row: Row
    record: Record


def render(experiment: Experiment) -> str:
    """Renders, for every text, its table, what few passes cost and gain, and samples.

    Args:
        experiment: The plan and the records.

    Returns:
        Markdown.

    Raises:
        UserError: If records of one text scored different characters.
    """
    parts = []
    for task in experiment.plan.tasks:
        if shown := _shown(experiment, task):
            experiment.first(task, "unigram_bpc")
            parts += [_task(task, shown), *_goals(experiment.plan.goals.get(task, []), shown)]
            parts += [*_few_passes(shown), *_fastest(shown), *_curves(shown), *_samples(shown)]
    return "\n\n".join(parts)


def _shown(experiment: Experiment, task: str) -> list[Shown]:
    """Returns the rows with records of a task, and the first record of each."""
    return [Shown(name, row, experiment.of(name, task)[0]) for name, row in experiment.rows(task)]


def _task(task: str, shown: Sequence[Shown]) -> str:
    metrics = shown[0].record.metrics
    scored = {
        one.record.metrics["characters"]["test"]
        for one in shown
        if "test" in one.record.metrics.get("characters", {})
    }
    if len(scored) > 1:
        raise UserError(
            f"records of {task} scored {sorted(scored)} characters of test: run them with the same "
            "--overlay, or add --again"
        )
    caption = f"**{task}**"
    if "test" in metrics.get("characters", {}):
        caption += f": {metrics['characters']['test']:,} characters of test"
    if "unigram_bpc" in metrics:
        caption += f", unigram entropy {metrics['unigram_bpc']:.3f} bits"
    lengths = {one.record.metrics.get("generation_length", 0) for one in shown} - {0}
    windows = " or ".join(map(str, sorted(lengths)))
    caption += f". A sequence is a window of {windows} characters." if windows else "."
    budgets = sorted({one.record.budget for one in shown if one.record.budget})
    caption += f" Budget: {'; '.join(budgets)}." if budgets else ""
    proved = any("archive_bpc" in one.record.metrics for one in shown)
    lines = [HEAD, *(_line(task, one) for one in shown)]
    if not proved:  # records of a plan without archives
        lines = [
            [cell for name, cell in zip(HEAD, line, strict=True) if name != ARCHIVE]
            for line in lines
        ]
    return f"{caption}\n\n{table(lines[0], lines[1:])}"


def _line(task: str, shown: Shown) -> list[str]:
    _, row, record = shown
    metrics = record.metrics
    return [
        row.label,
        number(row.published.get(task), ".2f"),
        number(row.published_seconds.get(task), ".3g"),
        bits(record, metrics.get("test_bpc")),
        number(metrics.get("archive_bpc"), ".3f"),
        bits(record, metrics.get("test_bpc_stateful")),
        bits(record, metrics.get("test_bpc_importance")),
        number(metrics.get("passes"), "d"),
        number(metrics.get("fixed_point_iterations"), ".4g"),
        number(record.parameters, ",d"),
        number(metrics.get("train_seconds"), ",.0f"),
        number(metrics.get("generation_seconds_1")),
        number(metrics.get("generation_seconds_32")),
    ]


def _ngram_order(shown: Shown) -> int | None:
    """Returns the order of the n-grams that a network is conditioned on, if any."""
    order: int | None = setting(shown.record.config, "model.init_args.flow.init_args.ngram_order")
    return order


def _class(shown: Shown, key: str) -> str:
    """Returns the name of the class of a part of a record's model, or an empty string."""
    part = setting(shown.record.config, f"model.init_args.{key}")
    path = part.get("class_path", "") if isinstance(part, dict) else part
    return path.rpartition(".")[2] if isinstance(path, str) else ""


def _is_few(record: Record) -> bool:
    """Says whether a record's passes are at most a tenth of the characters that they generate."""
    length = record.metrics.get("generation_length", 0)
    return 10 * int(record.metrics["passes"]) <= length


def _scored(shown: Sequence[Shown]) -> list[Shown]:
    """Returns the rows whose bits are exact, the fewest first."""
    scored = [
        one
        for one in shown
        if one.record.likelihood == "exact" and "test_bpc" in one.record.metrics
    ]
    return sorted(scored, key=lambda one: one.record.metrics["test_bpc"])


def _goals(goals: Sequence[Goal], shown: Sequence[Shown]) -> list[str]:
    """Returns the goals of rows that have records, beside what was measured."""
    found, rows = {one.name: one for one in shown}, []
    for goal in goals:
        if goal.row not in found or goal.above not in (None, *found):
            continue
        one, above = found[goal.row], 0.0
        measured = _test_bits(one.record, goal.passes)
        if goal.above is not None:
            above = _test_bits(found[goal.above].record)
        if math.isnan(measured - above):
            continue
        what = one.row.label + ("" if goal.passes is None else f", {goal.passes} passes")
        asked = f"at most {goal.at_most:.2f}"
        asked += "" if goal.above is None else f" above: {found[goal.above].row.label}"
        shortfall = measured - above - goal.at_most
        missed = f"missed by {shortfall:.3f}" if shortfall > 0 else "met"
        rows.append([what, asked, f"{measured:.3f}", missed])
    if not rows:
        return []
    head = ("goal for", "test bpc asked for", "test bpc", "")
    return ["The goals that were set before the runs:", table(head, rows)]


def _test_bits(record: Record, passes: int | None = None) -> float:
    """Returns bits per character of test, in so many passes; NaN where they were not measured."""
    if passes in (None, record.metrics.get("passes")):
        return float(record.metrics.get("test_bpc", math.nan))
    return float(record.metrics.get("passes_bpc", {}).get(str(passes), math.nan))


def _few_passes(shown: Sequence[Shown]) -> list[str]:
    """Returns the best with at most a tenth as many passes as characters, beside the others."""
    scored = [one for one in _scored(shown) if one.record.metrics.get("passes")]
    few = [one for one in scored if _is_few(one.record)]
    many = [one for one in scored if not _is_few(one.record)]
    alone = [one for one in few if not _ngram_order(one)]
    alone_too = [one for one in many if not _ngram_order(one)]
    recipe = [one for one in few if _class(one, "objective") == "EndToEnd"]
    flows = [
        one
        for one in alone
        if _class(one, "flow.init_args.base") == "FactorizedBase" and one not in recipe
    ]
    rows = []
    for best, others in ((few, many), (alone, alone_too), (flows, recipe[:1])):
        for other in others if best else []:
            bits_of = [one.record.metrics["test_bpc"] for one in (best[0], other)]
            row = [
                _name(best[0].row, best[0].record),
                f"{bits_of[0]:.3f}",
                _name(other.row, other.record),
                f"{bits_of[1]:.3f}",
                f"{bits_of[0] - bits_of[1]:+.3f}",
            ]
            if row not in rows:
                rows.append(row)
    if not rows:
        return []
    caption = (
        "The best exact model with at most a tenth as many passes as characters, beside those with "
        "more passes; the same among networks not conditioned on n-grams; and of these the best "
        "flow on a factorized base, beside the best of the paper's recipes:"
    )
    head = ("few passes", "test bpc", "beside", "its test bpc", "more bits")
    return [caption, table(head, rows)]


def _fastest(shown: Sequence[Shown]) -> list[str]:
    """Returns the fastest generator with no more bits than each exact system."""
    scored, rows = _scored(shown), []
    for number_of, one in enumerate(scored):
        cells = [_name(one.row, one.record), f"{one.record.metrics['test_bpc']:.3f}"]
        for key in ("generation_seconds_1", "generation_seconds_32"):
            rivals = [rival for rival in scored[:number_of] if key in rival.record.metrics]
            seconds = one.record.metrics.get(key)
            if not rivals or seconds is None:
                cells += ["–", "–"]
                continue
            best = min(rivals, key=lambda rival: rival.record.metrics[key])
            cells += [
                _name(best.row, best.record),
                f"{seconds / best.record.metrics[key]:.2f}",
            ]
        rows.append(cells)
    if len(rows) < 2:
        return []
    caption = (
        "For each system, the fastest generator among those with no more bits, and its speed-up:"
    )
    fastest = ("fastest, 1 sequence", "speed-up", "fastest, 32 sequences", "speed-up")
    head = ("system", "test bpc", *fastest)
    return [caption, table(head, rows)]


def _curves(shown: Sequence[Shown]) -> list[str]:
    """Returns the bits of networks that were trained for several numbers of passes."""
    rows = []
    for _, row, record in shown:
        seconds = record.metrics.get("passes_seconds_1", {})
        for passes, found in record.metrics.get("passes_bpc", {}).items():
            rows.append([row.label, passes, f"{found:.3f}", number(seconds.get(passes))])
    if not rows:
        return []
    caption = "One network each, in every number of passes that it was trained for:"
    return [caption, table(("system", "passes", "test bpc", "1 sequence, s"), rows)]


def _name(row: Row, record: Record) -> str:
    """Returns the label of a row with its passes."""
    return f"{row.label}, {number(record.metrics.get('passes'), 'd')} passes"


def _samples(shown: Sequence[Shown]) -> list[str]:
    """Returns the first sample of every row, if any record has one.

    A sign stands for a line break within a sample, so that no sample can end the block.
    """
    lines = []
    for _, row, record in shown:
        if samples := record.metrics.get("samples"):
            text = "".join(SIGNS.get(sign, sign) for sign in samples[0])
            broken = [text[start : start + 88] for start in range(0, len(text), 88)]
            lines += [_name(row, record), *(f"    {part}" for part in broken)]
    if not lines:
        return []
    caption = "The first window that each generated (↵ is a line break):"
    return [caption, "\n".join(["```text", *lines, "```"])]
