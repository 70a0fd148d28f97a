"""The flow `retrain`: from the champion to a challenger, and to a decision between them.

prefect deployment run retrain/geo3k-weekly                          where data or code changed
prefect deployment run retrain/geo3k-weekly -p because="new figures" in any case

Every stage finds its own earlier result, so a flow run that was suspended, retried or resumed repeats nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import FlowPauseTimeout, TerminationSignal
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled, Running

from dapo.config.run import RunConfig
from dapo.errors import ConfigError
from dapo.eval.gate import GateConfig
from dapo.eval.models import BASE, checkpoint_of
from dapo.eval.retrain import Split, measuring_config, require_split, training_config
from dapo.files import write_whole
from dapo.observe.registry import CHAMPION, ChampionChanged, ModelVersion, Registry
from dapo.observe.run_folder import RunFolder
from dapo.observe.shipper import tracking_uri
from flows import names
from flows.cancellation import retraining_file, stop_training
from flows.dapo import dapo
from flows.parameters import DEFAULT_PATH, Overrides, resolve
from flows.recovery import begin, come_back, leave, wait_for_server
from tasks.cached import CachedStage
from tasks.decide import decide
from tasks.evaluate import evaluate
from tasks.find_reason import find_reason
from tasks.prepare_dataset import prepare_dataset
from tasks.progress import artifact_key, best_effort
from tasks.promote import promote
from tasks.register import register
from tasks.watch import cancelled, interrupted_when_cancelled


class Approval(RunInput):
    """The form in Prefect's page."""

    decision: Literal["promote", "keep the champion"] = "keep the champion"
    note: str = ""
    """Kept with the decision."""


def run_name() -> str:
    return names.of_training(flow_run.parameters, flow_run.parameters.get("because") or "if-changed")


@flow(
    name="retrain",
    flow_run_name=run_name,
    persist_result=False,
    on_cancellation=[stop_training],
    on_crashed=[come_back],
)
def retrain(
    config_path: str = DEFAULT_PATH,
    overrides: Overrides = None,
    config: RunConfig | None = None,
    because: str = "",
    gate: GateConfig | None = None,
    gate_split: Split | None = None,
    gate_overrides: Overrides = None,
    approval: bool = False,
    approval_hours: float = 72.0,
) -> Any:
    """Train again from the champion, measure both on the same held-out prompts, promote what is better.

    Args:
        config_path: YAML file, relative to the worker's working directory; `mlflow.registered_model` must be set.
        overrides: dotted keys on top of the file.
        config: a whole configuration instead of the file.
        because: why; empty: train only where data or training code changed since the champion was trained.
        gate: what the challenger must show.
        gate_split: held-out split of the comparison; null: the one that training does not validate on.
        gate_overrides: dotted keys for the comparison only, for example {"validation.samples": 8}.
        approval: a person must agree to a promotion; the flow waits, with a form in its page.
        approval_hours: after which the champion stays.

    Returns:
        promoted | refused | skipped: and why.
    """
    run = resolve(config_path, overrides, config)
    name = run.mlflow.registered_model
    if not name:
        raise ConfigError("retrain needs a registered model: set mlflow.registered_model, for example to dapo-geo3k")
    begin()
    measuring = measuring_config(run, gate_split, gate_overrides or ())
    begun = _begin(run, because, measuring.data.validation_split)
    best_effort(create_markdown_artifact, f"{name}: {begun.reason}", key=artifact_key("reason", name))
    if begun.training is None:
        return f"skipped: {begun.reason}"
    training = begun.training
    state: Any = dapo(config=training, return_state=True)
    if state.is_cancelled():
        return Cancelled(message=f"the training was stopped: {state.message}; retry this flow run to go on")
    state.result()

    folder = RunFolder.of(training)
    checkpoint = str(checkpoint_of(folder.root))
    data = str(json.loads(folder.inputs.read_text())["data"])
    kept = {"because": begun.reason, "run": folder.id}
    try:
        after = _measured(measuring, checkpoint, data, "challenger")
        challenger = register(run, checkpoint, after)
        while True:
            champion = _opponent(run, challenger)
            against = champion.version if champion else None
            before = _measured(measuring, champion.reference if champion else BASE, data, "champion")
            decision = decide(name, before, after, gate or GateConfig()) | kept
            if decision["promote"] and approval:
                promote(run, challenger, against, decision | {"promote": None})
                decision |= _asked(name, challenger, against, decision, approval_hours)
            try:
                path = promote(run, challenger, against, decision)
                break
            except ChampionChanged as changed:
                get_run_logger().warning("compared again: %s", changed)
    except TerminationSignal:
        if not cancelled():
            raise
        return Cancelled(message="cancelled while it measured; retry this flow run to go on")
    get_run_logger().info("decision: %s", path)
    wait_for_server()
    return f"{'promoted' if decision['promote'] else 'refused'}: {'; '.join(decision['reasons'])}"


def _measured(config: RunConfig, reference: str, data: str, label: str) -> str:
    """The evaluation's folder; raises TerminationSignal where the flow run is cancelled meanwhile."""
    with interrupted_when_cancelled():
        return evaluate(config, reference, data, label)


def _opponent(run: RunConfig, challenger: int) -> ModelVersion | None:
    """The version that the challenger has to beat: the current champion, not the one from before the training.

    It is saved, because a flow run that is repeated after its promotion would find the challenger itself as champion.
    """
    place = retraining_file(run, str(flow_run.id))
    saved = json.loads(place.read_text())
    registry = Registry(tracking_uri(run), run.mlflow.registered_model or "")
    now = registry.get(CHAMPION)
    version = now.version if now else None
    if version not in (saved["champion"], challenger):
        get_run_logger().info("the champion is %s now, was %s: compared with that", version, saved["champion"])
        saved["champion"] = version
        write_whole(place, json.dumps(saved, indent=1))
    return registry.require(saved["champion"]) if saved["champion"] is not None else None


def _asked(name: str, challenger: int, champion: int | None, decision: dict[str, Any], hours: float) -> dict[str, Any]:
    """A person's answer, as changes to the decision; without an answer the champion stays."""
    over = f"version {champion}" if champion is not None else "the base"
    question = f"Promote **{name} version {challenger}** over {over}?\n\n"
    question += "\n".join(f"- {reason}" for reason in decision["reasons"])
    form = Approval.with_initial_data(description=question)
    try:
        # Agreed to over one champion, a promotion over another is another question.
        answer = _answer(form, int(hours * 3600), about=f"approval-over-{champion or 'base'}")
    except FlowPauseTimeout:
        _go_on()
        reason = f"nobody approved within {hours:g} hours"
        return {"promote": False, "reasons": [reason], "approval": {"decision": "none", "note": reason}}
    approval = {"decision": answer.decision, "note": answer.note}
    if answer.decision == "promote":
        return {"approval": approval}
    return {"promote": False, "reasons": [f"not approved: {answer.note or 'no note'}"], "approval": approval}


def _answer(form: type[Approval], timeout_s: int, about: str) -> Approval:
    """A deployment's run is suspended here: waiting for a person occupies no worker; the answer starts it again."""
    with get_client(sync_client=True) as client:
        # A retry forgets that this was asked, and Prefect takes a key's form once. Resumed, it is the same attempt.
        key = f"{about}-{client.read_flow_run(UUID(flow_run.id)).run_count}"
    if not deployment.id:
        return pause_flow_run(wait_for_input=form, timeout=timeout_s, key=key)
    leave()
    answer = suspend_flow_run(wait_for_input=form, timeout=timeout_s, key=key)
    begin()  # here only the process that was started with the answer
    return answer


def _go_on() -> None:
    """Running again: Prefect fails a flow that ends while it is paused."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(flow_run.id), Running(), force=True)


@dataclass(frozen=True, slots=True)
class _Begun:
    """What a retraining started from; fixed, even if the champion or the data change later."""

    reason: str
    training: RunConfig | None
    """None: there was no reason to train."""


def _begin(run: RunConfig, because: str, split: Split) -> _Begun:
    """The reason and the training's configuration, saved per flow run."""
    place = retraining_file(run, str(flow_run.id))
    if place.is_file():
        saved = json.loads(place.read_text())
        return _Begun(saved["reason"], RunConfig.model_validate(saved["training"]))
    train, reason, version = find_reason(run, because)
    if not train:
        return _Begun(reason, None)
    # Now, for after days of training it would be too late; the training finds the same data prepared.
    require_split(Path(CachedStage(prepare_dataset, run.data).result()), split)
    name = run.mlflow.registered_model or ""
    champion = Registry(tracking_uri(run), name).require(version) if version is not None else None
    training = training_config(run, champion, str(flow_run.id).replace("-", "")[:8])
    record = {"reason": reason, "champion": version, "training": training.model_dump(mode="json")}
    write_whole(place, json.dumps(record, indent=1))
    return _Begun(reason, training)
