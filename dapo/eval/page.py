"""HTML pages of this package, styled like the run's report."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dapo.config.run import RunConfig
from dapo.eval.samples_table import png
from dapo.files import write_whole
from dapo.types import RolloutGroup

_SHOWN = 24
_SAMPLES_SHOWN = 4


def write_page(path: Path, template: str, **given: Any) -> Path:
    """Render a template of `dapo/eval/templates`; text is escaped, and the file is whole or not there."""
    import jinja2

    loader = jinja2.ChoiceLoader([jinja2.PackageLoader("dapo.eval"), jinja2.PackageLoader("dapo.observe")])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"percent": _percent, "signed": _signed}
    write_whole(path, environment.get_template(template).render(**given))
    return path


def write_evaluation(
    path: Path,
    config: RunConfig,
    inputs: Mapping[str, Any],
    measured: Mapping[str, Any],
    groups: Sequence[RolloutGroup],
) -> Path:
    """The page of one evaluation: estimates with intervals, slices, answers with their images, wrong ones first."""
    by_accuracy = sorted(groups, key=lambda g: g.num_correct / len(g.rollouts))
    half = _SHOWN // 2
    shown = groups if len(groups) <= _SHOWN else [*by_accuracy[:half], *by_accuracy[-half:]]
    return write_page(
        path,
        "evaluation.html.j2",
        title=path.parent.name,
        model=inputs["model"],
        config=config,
        data=inputs["data"],
        metrics=measured["metrics"],
        estimates=measured["estimates"],
        slices=measured["slices"],
        samples=[_card(group) for group in shown],
        total=len(groups),
    )


def _card(group: RolloutGroup) -> dict[str, Any]:
    return {
        "id": group.prompt.id,
        "question": group.prompt.question,
        "answer": group.prompt.answer,
        "images": [base64.b64encode(png(image)).decode() for image in group.prompt.images],
        "right": group.num_correct,
        "of": len(group.rollouts),
        "rollouts": group.rollouts[:_SAMPLES_SHOWN],
    }


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.1f} %"


def _signed(value: float | None) -> str:
    """A difference of shares in percentage points."""
    return "–" if value is None or value != value else f"{100 * value:+.1f}"
