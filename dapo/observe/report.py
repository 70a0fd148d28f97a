"""One self-contained HTML page per run: what was learned, how healthy, where the time went, answers with images."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml

from dapo.errors import DataError
from dapo.files import write_whole
from dapo.observe import manifest
from dapo.observe.curves import CHARTS, draw
from dapo.observe.journal import Event, read
from dapo.observe.run_folder import RunFolder

SAMPLES = 12


def write_report(folder: RunFolder) -> Path:
    """Write `report.html` from the journal, the validation tables and the manifest; safe at any time of the run.

    Raises:
        DataError: the folder has no journal.
    """
    events = list(read(folder.journal))
    if not events:
        raise DataError(f"{folder.root} holds no run: {folder.journal.name} is missing or empty")
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dapo.observe"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        run=folder.id,
        summary=(totals := summary(events)),
        headline=headline(totals),
        charts=[(chart, svg) for chart in CHARTS if (svg := draw(chart, events))],
        samples=samples(folder, events),
        alarms=[e for e in events if e.kind == "alarm"],
        checkpoints=[e for e in events if e.kind == "checkpoint"],
        made_from=manifest.read(folder),
        config=yaml.safe_dump(yaml.safe_load(folder.config.read_text()), sort_keys=False),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    write_whole(folder.report, page)
    return folder.report


def summary(events: list[Event]) -> dict[str, Any]:
    """The run in a few numbers: status, steps, held-out accuracy before, after and best, time."""
    validations = [e for e in events if e.kind == "validation"]
    steps = [e for e in events if e.kind == "step"]
    ended = events[-1] if events[-1].kind == "ended" else None
    best = max(validations, key=lambda e: e.data["metrics"]["val/accuracy"], default=None)
    return {
        "status": ended.data["status"] if ended else "running",
        "reason": ended.data["reason"] if ended else "",
        "step": steps[-1].step if steps else 0,
        "total_steps": next((e.data["total_steps"] for e in reversed(events) if e.kind == "started"), 0),
        "before": validations[0] if validations else None,
        "after": validations[-1] if validations else None,
        "best": best,
        "seconds_per_step": sum(e.data["metrics"]["time/step"] for e in steps) / len(steps) if steps else None,
        "minutes": (events[-1].time - events[0].time) / 60,
        "alarms": sum(e.kind == "alarm" for e in events),
        "attempts": sum(e.kind == "started" for e in events),
    }


def headline(totals: dict[str, Any]) -> list[tuple[str, str]]:
    """`summary` as (value, label) for people."""

    def accuracy(event: Event | None) -> str:
        return f"{100 * event.data['metrics']['val/accuracy']:.1f} %" if event else "-"

    best = f"best, step {totals['best'].step}" if totals["best"] else "best"
    return [
        (accuracy(totals["before"]), "held-out accuracy before"),
        (accuracy(totals["after"]), "after"),
        (accuracy(totals["best"]), best),
        (f"{totals['step']} of {totals['total_steps']}", "steps"),
        (f"{totals['seconds_per_step']:.2f} s" if totals["seconds_per_step"] else "-", "mean time of a step"),
        (f"{totals['minutes']:.1f} min", "training"),
        (str(totals["alarms"]), "alarms"),
        (str(totals["attempts"]), "start of the job" if totals["attempts"] == 1 else "starts of the job"),
    ]


def write_plots(folder: RunFolder) -> list[Path]:
    """Each chart of the report as an SVG file of its own, for MLflow and for documents."""
    events = list(read(folder.journal))
    folder.plots.mkdir(exist_ok=True)
    written = []
    for chart in CHARTS:
        if svg := draw(chart, events):
            path = folder.plots / f"{chart.title.lower().replace(' ', '-')}.svg"
            path.write_text(svg)
            written.append(path)
    return written


def samples(folder: RunFolder, events: list[Event]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The same held-out prompts answered before and after, those whose verdict changed first."""
    tables = [folder.root / e.data["table"] for e in events if e.kind == "validation"]
    if not tables:
        return []
    before, after = _rows(tables[0]), _rows(tables[-1])
    pairs = [(before[key], after[key]) for key in before if key in after]
    pairs.sort(key=lambda pair: pair[0]["accuracy"] == pair[1]["accuracy"])
    return pairs[:SAMPLES]


def _rows(table: Path) -> dict[str, dict[str, Any]]:
    if not table.exists():
        return {}
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["id"], row)
    return first
