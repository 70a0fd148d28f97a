"""The promotion gate's stage: two evaluations in, a decision out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from dapo.errors import DataError
from dapo.eval.evaluate import EvaluationFolder
from dapo.eval.gate import Decision, GateConfig
from dapo.eval.gate import decide as weigh
from tasks.progress import artifact_key, best_effort


@task(cache_policy=NO_CACHE, persist_result=False)
def decide(name: str, champion: str, challenger: str, gate: GateConfig) -> dict[str, Any]:
    """What `Decision.plain` holds, and both evaluations' folders.

    Args:
        name: of the registered model.
        champion: folder of the champion's evaluation.
        challenger: folder of the challenger's.

    Raises:
        DataError: they answered different questions.
    """
    before, after = EvaluationFolder(Path(champion)), EvaluationFolder(Path(challenger))
    if before.read_inputs()["set"] != after.read_inputs()["set"]:
        raise DataError(
            f"{before.id} and {after.id} were not asked and judged alike: the reward or the code that measures changed "
            "between them; retry this flow run, and what is missing is measured again"
        )
    decision = weigh(before.read_results(), after.read_results(), gate)
    log = get_run_logger()
    for check in decision.checks:
        log.info("%s %s: %s", "passed" if check.passed else "FAILED", check.name, check.reason)
    best_effort(create_markdown_artifact, as_markdown(name, decision), key=artifact_key("decision", name))
    return decision.plain() | {"evaluations": {"champion": before.id, "challenger": after.id}}


def as_markdown(name: str, decision: Decision) -> str:
    """The decision for the Prefect page."""
    lines = [f"# {name}: {'promote' if decision.promote else 'keep the champion'}", ""]
    lines += [f"- {reason}" for reason in decision.reasons]
    lines += ["", "| check | | |", "|---|---|---|"]
    lines += [f"| {c.name} | {'passed' if c.passed else '**failed**'} | {c.reason} |" for c in decision.checks]
    lines += ["", "| | champion | challenger |", "|---|---|---|"]
    lines += [f"| {k} | {v:.4g} | {decision.challenger[k]:.4g} |" for k, v in decision.champion.items()]
    if decision.slices:
        lines += ["", "| slice | prompts | champion | challenger | difference |", "|---|---|---|---|---|"]
        lines += [
            f"| {s.tag} | {s.prompts} | {s.baseline:.3f} | {s.ours:.3f} "
            f"| {s.difference.value:+.3f} [{s.difference.low:+.3f}, {s.difference.high:+.3f}] |"
            for s in decision.slices
        ]
    return "\n".join(lines)
