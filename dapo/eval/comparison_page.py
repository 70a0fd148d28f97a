"""A comparison as one self-contained page, and as Markdown for Prefect and the terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from dapo.eval.compare import AXES, Axis, Comparison, Difference, Pair, course
from dapo.eval.page import write_page
from dapo.eval.runs import RunRecord
from dapo.observe.curves import COLOURS, svg

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
        sections=_sections(comparison.differences),
        shorten=lambda text: text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} …",
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def page_name(runs: Sequence[str]) -> str:
    """File name for a comparison of these references."""
    return "-".join(re.sub(r"[^\w.-]", "_", run)[:24] for run in runs) + ".html"


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
        ("responses", [_number(c.responses, 0) for c in costs]),
        ("device-hours", [_number(c.device_hours, 4) for c in costs]),
        ("responses per point", [_number(c.per_point(c.responses), 0) for c in costs]),
        ("device-hours per point", [_number(c.per_point(c.device_hours), 5) for c in costs]),
    ):
        lines.append(f"| {title} | {' | '.join(values)} |")
    for axis, points in comparison.equal.items():
        if points:
            lines += ["", f"## At equal {AXES[axis]}", "", head.replace("| | ", "| metric at | ", 1)]
            lines += [f"| {p.metric} at {p.at:.4g} | {' | '.join(_number(v) for v in p.values)} |" for p in points]
    if comparison.pairs:
        lines += ["", f"## Against {names[0]}, over the same prompts", ""]
        lines += [f"- **{pair.run}**: {_told(pair)}" for pair in comparison.pairs]
    if comparison.differences:
        lines += ["", "## What differs", "", head.replace("| | ", "| key | ", 1)]
        lines += [f"| {d.section}: {d.key} | {' | '.join(v[:40] for v in d.values)} |" for d in comparison.differences]
    return "\n".join(lines)


def _told(pair: Pair) -> str:
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

    figure = Figure(figsize=(5.6, 3.1), layout="constrained")
    axes = figure.add_subplot()
    for name, colour, points in lines:
        mark = "o" if len(points) < 15 else None
        axes.plot(*zip(*points, strict=True), label=name, color=colour, linewidth=1.8, marker=mark, markersize=4)
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
