"""A comparison as one self-contained page, and as Markdown for Prefect and the terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from dapo.errors import ConfigError
from dapo.eval.compare import AXES, Axis, Comparison, Difference, EqualPoint, Pair, compare, course
from dapo.eval.page import write_page
from dapo.eval.runs import RunRecord, read_runs
from dapo.observe.curves import COLOURS, SIZE, svg
from dapo.observe.shipper import connect

_CHARTS: tuple[tuple[str, str, Axis, str], ...] = (
    ("Held-out accuracy by step", "val/accuracy", "step", "share right"),
    ("Held-out accuracy by responses", "val/accuracy", "responses", "share right"),
    ("Held-out accuracy by device-hours", "val/accuracy", "device_hours", "share right"),
    ("Accuracy of sampled groups", "groups/accuracy", "step", "share right"),
    ("Mean reward", "reward/mean", "step", "reward"),
    ("Entropy", "train/entropy", "step", "nats per token"),
    ("Response length", "response/length_mean", "step", "tokens"),
    ("Engine against trainer", "engine/gap_mean", "step", "nats"),
    ("Time of a step", "time/step", "step", "seconds"),
)
_LONGEST_VALUE = 120


def compare_runs(
    references: Sequence[str], tracking_uri: str, run_root: str, page: Path | None = None
) -> tuple[str, Path]:
    """Runs side by side, from what MLflow knows of them: a summary (Markdown), and the page.

    Args:
        references: MLflow ids, names or beginnings of names; the first is the baseline.
        tracking_uri: the MLflow store that knows them all.
        run_root: folder of runs; the page goes into its `comparisons`.
        page: where to write instead.

    Raises:
        ConfigError: fewer than two runs, or one means no run or several.
    """
    if len(references) < 2:
        raise ConfigError(f"a comparison needs at least two runs, got {len(references)}")
    found = compare(read_runs(connect(tracking_uri), references))
    name = "-".join(re.sub(r"[^\w.-]", "_", run)[:24] for run in references) + ".html"
    page = page or Path(run_root) / "comparisons" / name
    return markdown(found), write_comparison(found, page.resolve())


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """The page."""
    charts = [(title, drawn) for title, m, axis, unit in _CHARTS if (drawn := _draw(comparison.runs, m, axis, unit))]
    return write_page(
        path,
        "comparison.html.j2",
        title=" / ".join(run.name for run in comparison.runs),
        c=comparison,
        axes=AXES,
        charts=charts,
        colours=COLOURS,
        forests={pair.run: _forest(pair) for pair in comparison.pairs if pair.difference},
        tiles=_tiles(comparison),
        equal={axis: _by_metric(points) for axis, points in comparison.equal.items()},
        number=_number,
        sections=_sections(comparison.differences),
        shorten=lambda text: text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} …",
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def markdown(comparison: Comparison) -> str:
    """The same in a few tables."""
    names = [run.name for run in comparison.runs]
    head = f"| | {' | '.join(names)} |\n|---|{'---|' * len(names)}"
    lines = [f"# {' / '.join(names)}", "", head]
    costs = comparison.costs
    for title, values in (
        ("accuracy, first", [_number(c.first) for c in costs]),
        ("accuracy, last", [_number(c.last) for c in costs]),
        ("steps", [str(c.steps) for c in costs]),
        ("responses", [_number(c.responses) for c in costs]),
        ("device-hours", [_number(c.device_hours) for c in costs]),
        ("responses per point", [_number(c.per_point(c.responses)) for c in costs]),
        ("device-hours per point", [_number(c.per_point(c.device_hours)) for c in costs]),
    ):
        lines.append(f"| {title} | {' | '.join(values)} |")
    for axis, points in comparison.equal.items():
        if points:
            lines += ["", f"## At equal {AXES[axis]}", "", head.replace("| | ", "| metric at | ", 1)]
            lines += [f"| {p.metric} at {_number(p.at)} | {' | '.join(map(_number, p.values))} |" for p in points]
    if comparison.pairs:
        lines += ["", f"## Against {names[0]}, over the same prompts", ""]
        lines += [f"- **{pair.run}**: {_pair_text(pair)}" for pair in comparison.pairs]
    if comparison.differences:
        lines += ["", "## What differs", "", head.replace("| | ", "| key | ", 1)]
        lines += [f"| {d.section}: {d.key} | {' | '.join(v[:40] for v in d.values)} |" for d in comparison.differences]
    return "\n".join(lines)


def _pair_text(pair: Pair) -> str:
    d = pair.difference
    if d is None:
        return pair.where
    verdict = "more than chance" if d.low > 0 or d.high < 0 else "may be chance"
    return (
        f"accuracy {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}] over {pair.prompts} prompts: {verdict} ({pair.where})"
    )


def _sections(differences: Sequence[Difference]) -> dict[str, list[Difference]]:
    found: dict[str, list[Difference]] = {"configuration": [], "data": [], "code": [], "packages": []}
    for difference in differences:
        found[difference.section].append(difference)
    return found


def _draw(runs: Sequence[RunRecord], metric: str, axis: Axis, unit: str) -> str | None:
    lines = [(r.name, COLOURS[i % len(COLOURS)], course(r, metric, axis)) for i, r in enumerate(runs)]
    lines = [line for line in lines if line[2]]
    if not lines:
        return None
    from matplotlib.figure import Figure  # no pyplot: no global state, any thread

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    for name, colour, points in lines:
        mark = "o" if len(points) < 15 else None
        axes.plot(*zip(*points, strict=True), label=name, color=colour, linewidth=1.8, marker=mark, markersize=4)
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def _forest(pair: Pair) -> str:
    """Differences with their intervals, all prompts first, then the slices: what lies right of 0 is better."""
    from matplotlib.figure import Figure  # no pyplot: no global state, any thread

    assert pair.difference is not None
    rows = [(f"all prompts ({pair.prompts})", pair.difference)]
    rows += [(f"{s.tag} ({s.prompts})", s.difference) for s in pair.slices]
    figure = Figure(figsize=(9.6, 0.8 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="#6b7280", linewidth=1)
    for place, (_, d) in enumerate(rows):
        colour = "#0f766e" if d.low > 0 else "#b42318" if d.high < 0 else "#6b7280"
        axes.plot([100 * d.low, 100 * d.high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot(100 * d.value, place, "o" if place else "D", color=colour, markersize=6)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("difference of accuracy (percentage points), 95 % interval; in brackets: prompts")
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return svg(figure)


def _tiles(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Headline numbers: (value, label, right | wrong | "")."""
    found = []
    for pair in comparison.pairs:
        if (d := pair.difference) is not None:
            verdict, mark = (
                ("better", "right") if d.low > 0 else ("worse", "wrong") if d.high < 0 else ("no verdict", "")
            )
            label = f"{pair.run}: points of accuracy, 95 %: {100 * d.low:+.1f} to {100 * d.high:+.1f}: {verdict}"
            found.append((f"{100 * d.value:+.1f}", label, mark))
    for c in comparison.costs:
        if c.last is not None:
            found.append((f"{100 * c.last:.1f} %", f"{c.run}: held-out accuracy, last", ""))
    return found


def _by_metric(points: Sequence[EqualPoint]) -> list[tuple[str, list[EqualPoint]]]:
    """A metric's points are one block of the table."""
    return [(metric, list(group)) for metric, group in groupby(points, lambda p: p.metric)]


def _number(value: float | None) -> str:
    """Human-readable: three decimals where they matter, fewer otherwise."""
    if value is None or value != value:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    if value == int(value) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.2g}"
