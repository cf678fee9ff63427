"""The table and the figure of the comparison on characters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dflows.errors import UserError
from dflows.records import Record
from experiments.plan import Row
from experiments.reports.experiment import Experiment
from experiments.reports.figures import drawing
from experiments.reports.markdown import number, table
from experiments.reports.text import bits

__all__ = ["describe_figure", "draw", "render"]

HEAD = (
    "system",
    "published bpc",
    "published, s",
    "test bpc, windows",
    "test bpc, carried",
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
    """Renders a table for every text, what few passes cost and gain, and samples.

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
            parts += [_task(task, shown), *_few_passes(shown), *_quickest(shown)]
            parts += [*_levels(shown), *_samples(shown)]
    return "\n\n".join(parts)


def _shown(experiment: Experiment, task: str) -> list[Shown]:
    """Returns the rows that a task has records of, with the first of each."""
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
    return f"{caption}\n\n{table(HEAD, [_line(task, one) for one in shown])}"


def _line(task: str, shown: Shown) -> list[str]:
    _, row, record = shown
    metrics = record.metrics
    return [
        row.label,
        number(row.published.get(task), ".2f"),
        number(row.published_seconds.get(task), ".3g"),
        bits(record, metrics.get("test_bpc")),
        bits(record, metrics.get("test_bpc_carried")),
        bits(record, metrics.get("test_bpc_importance")),
        number(metrics.get("passes"), "d"),
        number(metrics.get("fixed_point_iterations"), ".4g"),
        number(record.parameters, ",d"),
        number(metrics.get("train_seconds"), ",.0f"),
        number(metrics.get("generation_seconds_1")),
        number(metrics.get("generation_seconds_32")),
    ]


def _argument(record: Record, key: str) -> Any:
    """Returns an argument of a record's model, if it has it."""
    return record.config.get("model", {}).get("init_args", {}).get(key)


def _class(record: Record, key: str) -> str:
    """Returns the name of the class that an argument of a record's model is of, if of any."""
    part = _argument(record, key)
    path = part.get("class_path", "") if isinstance(part, dict) else part
    return path.rpartition(".")[2] if isinstance(path, str) else ""


def _is_few(record: Record) -> bool:
    """Tells whether a record's passes are at most a tenth of the characters that they generate."""
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


def _few_passes(shown: Sequence[Shown]) -> list[str]:
    """Returns what at most a tenth as many passes as characters reach, beside their opponents."""
    scored = [one for one in _scored(shown) if one.record.metrics.get("passes")]
    few = [one for one in scored if _is_few(one.record)]
    many = [one for one in scored if not _is_few(one.record)]
    alone = [one for one in few if not _argument(one.record, "ngram_order")]
    alone_too = [one for one in many if not _argument(one.record, "ngram_order")]
    recipe = [one for one in few if _class(one.record, "estimator") == "SoftmaxStraightThrough"]
    flows = [
        one for one in alone if _class(one.record, "base") == "FactorizedBase" and one not in recipe
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
        "more passes; the same of networks that are told of no n-grams; and of these the best flow "
        "on a factorized base, beside the best of the paper's recipes:"
    )
    head = ("few passes", "test bpc", "beside", "its test bpc", "more bits")
    return [caption, table(head, rows)]


def _quickest(shown: Sequence[Shown]) -> list[str]:
    """Returns what generates quickest with no more bits than each exact system has."""
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
        "What generates quickest with no more bits than a system has, and how many times as fast:"
    )
    head = ("system", "test bpc", "for 1 sequence", "times", "for 32 sequences", "times")
    return [caption, table(head, rows)]


def _name(row: Row, record: Record) -> str:
    """Returns what a row is called where its passes are not shown beside it."""
    return f"{row.label}, {number(record.metrics.get('passes'), 'd')} passes"


def _levels(shown: Sequence[Shown]) -> list[str]:
    """Returns a table of what the levels of a window cost, if any record tells."""
    lines = []
    for _, row, record in shown:
        metrics = record.metrics
        if "level_bpc" in metrics:
            costs = " ".join(f"{value:.2f}" for value in metrics["level_bpc"])
            lines.append([_name(row, record), costs])
    head = ("system", "bits per character of each level, in the order of generation")
    return [table(head, lines)] if lines else []


def _samples(shown: Sequence[Shown]) -> list[str]:
    """Returns the first sample of every row, if any record has one.

    A line break within a sample is shown by a sign, so that no sample can end the block.
    """
    lines = []
    for _, row, record in shown:
        if samples := record.metrics.get("samples"):
            text = "".join(SIGNS.get(sign, sign) for sign in samples[0])
            broken = [text[start : start + 88] for start in range(0, len(text), 88)]
            lines += [_name(row, record), *(f"    {part}" for part in broken)]
    if not lines:
        return []
    caption = "The first window that each generated, ↵ a line break:"
    return [caption, "\n".join(["```text", *lines, "```"])]


def _points(experiment: Experiment) -> list[Shown]:
    """Returns what the figure shows: the first text."""
    return _shown(experiment, next(iter(experiment.plan.tasks)))


def describe_figure(experiment: Experiment) -> str:
    """Returns what the figure shows, in words."""
    parts = [
        f"{name}: {bits(record, record.metrics.get('test_bpc'))} bits, "
        f"{number(record.metrics.get('passes'), 'd')} passes, "
        f"{number(record.metrics.get('generation_seconds_1'))} s"
        for name, _, record in _points(experiment)
    ]
    return "Bits per character against passes, and against seconds. " + "; ".join(parts)


def draw(experiment: Experiment, file: Path) -> None:
    """Draws bits per character against passes and against the seconds of one sequence.

    Args:
        experiment: The plan and the records.
        file: The SVG file.
    """
    words = describe_figure(experiment)
    points = [one for one in _points(experiment) if "test_bpc" in one.record.metrics]
    shown = {
        key: [(one.record.metrics[key], one) for one in points if key in one.record.metrics]
        for key in ("passes", "generation_seconds_1")
    }
    with drawing(file, words, ncols=2, figsize=(12, 5.2), sharey=True) as (_, axes):
        for place, named in zip(axes, shown.values(), strict=True):
            for number_of, (value, one) in enumerate(named):
                bound = one.record.likelihood == "bound"
                look = {"marker": "v" if bound else "o", "color": f"C{number_of % 10}", "s": 40}
                place.scatter(value, one.record.metrics["test_bpc"], **look)
        # Linear up to 1: a chain of n-grams takes no pass at all.
        axes[0].set_xscale("symlog", base=4, linthresh=1)
        axes[0].set_xlim(-0.2, 2 * max([1, *(passes for passes, _ in shown["passes"])]))
        axes[0].xaxis.set_major_formatter("{x:.0f}")
        axes[0].set_xlabel("passes: sequential network evaluations of one batch")
        axes[0].set_ylabel("bits per character, test (triangles: bounds)")
        axes[1].set_xscale("log")
        axes[1].set_xlabel("seconds to generate one sequence")
        axes[0].figure.draw_without_rendering()  # then it is known where points are
        for place, named in zip(axes, shown.values(), strict=True):
            _annotate(place, named)


def _annotate(place: Any, points: Sequence[tuple[float, Shown]]) -> None:
    """Names points, each where its name covers as little as can be of the points and other names.

    Names are of the rows, in 7 points, of which a letter is about 4 wide.
    """
    scale = 72 / place.figure.dpi
    spots = [
        scale * place.transData.transform((value, one.record.metrics["test_bpc"]))
        for value, one in points
    ]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    edges = scale * place.bbox.x0, scale * place.bbox.x1
    top = scale * place.bbox.y1
    for (x, y), (value, one) in sorted(
        zip(spots, points, strict=True), key=lambda named: tuple(named[0])
    ):
        width = 4.0 * len(one.name)
        boxes: list[tuple[float, float, float]] = []
        for up in (-3, 6, -12, 15, -21, 24, -30, 33, -39):
            boxes.append((6, up, x + 6))
            boxes.append((-6 - width, up, x - 6 - width))

        def covered(box: tuple[float, float, float], y: float = y, width: float = width) -> float:
            _, up, left = box
            overlaps = (
                max(0, min(left + width, x1) - max(left, x0))
                * max(0, min(y + up + 7, y1) - max(y + up, y0))
                for x0, y0, x1, y1 in taken
            )
            beyond = (edges[0] - left, left + width - edges[1], y + up + 7 - top)
            outside = sum(max(0.0, length) for length in beyond)
            return sum(overlaps) + 100 * outside + abs(up + 3) / 8

        dx, above, left = min(boxes, key=covered)
        taken.append((left, y + above, left + width, y + above + 7))
        place.annotate(
            one.name,
            (value, one.record.metrics["test_bpc"]),
            textcoords="offset points",
            xytext=(dx, above),
            fontsize=7,
        )
