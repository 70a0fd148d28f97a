"""The curves a user looks at first, drawn from the journal as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dapo.observe.journal import Event

SIZE = (4.8, 2.8)
"""Inches; smaller figures have larger letters, since pages stretch them to one width."""
COLOURS = ("#2563eb", "#e4572e", "#17a398", "#8b5cf6", "#d4a017", "#6b7280", "#be185d", "#15803d")


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart: which metrics, how they share it, and what the axis means."""

    title: str
    metrics: tuple[tuple[str, str], ...]
    """(metric name, label)"""
    unit: str
    kind: Literal["lines", "stack"] = "lines"
    note: str = ""
    band: tuple[str, str] | None = None
    """Metrics of the lower and upper end of an interval round the first line."""


CHARTS = (
    Chart(
        "Accuracy",
        (("val/accuracy", "held-out"), ("groups/accuracy", "sampled for training")),
        "share right",
        note="The band is the 95 % interval over held-out prompts.",
        band=("val/accuracy_low", "val/accuracy_high"),
    ),
    Chart("Reward", (("reward/mean", "mean reward"), ("reward/format", "format")), "reward"),
    Chart(
        "Entropy", (("train/entropy", "entropy"),), "nats per token", note="A fall towards zero is entropy collapse."
    ),
    Chart(
        "Response length",
        (("response/length_mean", "mean"), ("response/length_max", "longest"), ("val/length_mean", "held-out mean")),
        "tokens",
    ),
    Chart(
        "Groups by verdict",
        (
            ("groups/kept", "kept"),
            ("groups/all_right", "all right"),
            ("groups/all_wrong", "all wrong"),
            ("groups/failed", "failed"),
        ),
        "groups generated",
        kind="stack",
        note="Only kept groups carry signal: some responses right, some wrong.",
    ),
    Chart(
        "Clipped tokens",
        (("train/clip_high", "from above"), ("train/clip_low", "from below"), ("train/clip_dual", "dual clip")),
        "share of tokens",
    ),
    Chart(
        "Probability of tokens clipped from above",
        (("train/clipped_probability", "mean probability"),),
        "probability",
        note="In the paper it stays under 0.2: what is held back are unlikely tokens.",
    ),
    Chart(
        "Engine against trainer",
        (("engine/gap_mean", "mean |difference|"), ("engine/gap_p99", "99th percentile")),
        "nats",
        note="Difference of log-probabilities of the same tokens.",
    ),
    Chart("Gradient norm", (("train/grad_norm", "before clipping"),), "norm"),
    Chart(
        "Time of a step",
        (
            ("time/generate", "generate"),
            ("time/reward", "reward"),
            ("time/logprobs", "log-probs"),
            ("time/update", "update"),
            ("time/sync", "sync"),
        ),
        "seconds",
        kind="stack",
    ),
)


def series(events: Sequence[Event], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, of steps and validations."""
    points = [
        (e.step, float(e.data["metrics"][metric]))
        for e in events
        if e.kind in ("step", "validation") and metric in e.data["metrics"]
    ]
    return [p[0] for p in points], [p[1] for p in points]


def draw(chart: Chart, events: Sequence[Event]) -> str | None:
    """The chart as an SVG element, or None where the run has none of its metrics."""
    lines = [(label, *series(events, name)) for name, label in chart.metrics]
    lines = [line for line in lines if line[1]]
    if not lines:
        return None
    from matplotlib.figure import Figure  # no pyplot: no global state, any thread
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    if chart.kind == "stack":
        # A phase that a step did not have took no time in it.
        every = sorted({step for _, steps, _ in lines for step in steps})
        rows = [[dict(zip(steps, values, strict=True)).get(step, 0.0) for step in every] for _, steps, values in lines]
        axes.stackplot(every, *rows, labels=[label for label, _, _ in lines], colors=COLOURS, alpha=0.85)
    else:
        for colour, (label, steps, values) in zip(COLOURS, lines, strict=False):
            mark = "o" if len(steps) < 15 else None
            axes.plot(steps, values, label=label, color=colour, linewidth=1.8, marker=mark, markersize=4)
        _band(axes, chart, events)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    axes.set_ylabel(chart.unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        columns = len(lines) if len(lines) < 5 else 3  # a wider legend narrows the chart
        close = {"borderpad": 0, "columnspacing": 1.2, "handlelength": 1.2, "labelspacing": 0.2}
        axes.legend(frameon=False, fontsize=8, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), **close)
    return svg(figure)


def _band(axes: Any, chart: Chart, events: Sequence[Event]) -> None:
    if chart.band:
        steps, low = series(events, chart.band[0])
        _, high = series(events, chart.band[1])
        if steps and len(low) == len(high):
            axes.fill_between(steps, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)


def svg(figure: Any) -> str:
    """A matplotlib figure as an SVG element."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text: smaller, and it can be searched
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
