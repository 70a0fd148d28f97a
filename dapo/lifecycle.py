"""Commands for a model's life after training: evaluate, retrain, compare, models, register, promote, rollback."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from dapo.errors import ConfigError

_MODEL = "checkpoint, run or Hugging Face folder, models:/NAME@ALIAS, models:/NAME/VERSION, OWNER/NAME, or base"


def add_commands(commands: Any) -> None:
    """Add these commands to the parser of `dapo`."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure any model on held-out prompts",
        description="Measure a model: mean@k, pass@k, maj@k with intervals, slices, a page of answers. The same model "
        "and questions are measured once; asked again, the numbers are read.",
    )
    evaluate.add_argument("model", help=_MODEL)
    evaluate.add_argument("config", help="YAML file: data, decoding, grader, engine")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="for example validation.samples=32")
    evaluate.add_argument("--data", help="folder of prepared data (default: the configured source is prepared)")
    evaluate.set_defaults(command=_evaluate)

    retrain = commands.add_parser(
        "retrain",
        help="train again from the champion, and promote what is better",
        description="Run the flow `retrain` here: from the champion to a challenger, both measured on the same "
        "held-out prompts, and a decision. Without a reason it trains only where data or training code changed. A "
        "person's approval, and the schedule, are the deployment's: prefect deployment run retrain/geo3k-weekly.",
    )
    retrain.add_argument("config", help="YAML file; mlflow.registered_model names the model")
    retrain.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys over the file")
    retrain.add_argument("--because", default="", metavar="REASON", help="train in any case, and record why")
    retrain.add_argument(
        "--gate", nargs="+", default=[], metavar="key=value", help="for the comparison only, as validation.samples=8"
    )
    retrain.set_defaults(command=_retrain)

    compare = commands.add_parser(
        "compare",
        help="compare runs on one page",
        description="Compare runs from what MLflow knows of them: what differs, metrics at equal steps, responses and "
        "device-hours, paired intervals over prompts, cost per point, curves, slices.",
    )
    compare.add_argument(
        "runs", nargs="+", metavar="RUN", help="MLflow id, name or beginning of a name; first: baseline"
    )
    _add_store(compare)
    compare.add_argument("--out", type=Path, help="the page (default: comparisons/ in the folder of runs)")
    compare.set_defaults(command=_compare)

    models = commands.add_parser("models", help="list a registered model's versions", description="Versions, aliases.")
    models.add_argument("name", help="registered model")
    _add_store(models)
    models.set_defaults(command=_models)

    register = commands.add_parser(
        "register",
        help="register a run's checkpoint by reference",
        description="Register a checkpoint: MLflow records its path and description; nothing is copied.",
    )
    register.add_argument("checkpoint", type=Path, help="folder RUN/checkpoints/step-..., or a run's folder: its best")
    register.add_argument("name", help="registered model")
    register.set_defaults(command=_register)

    promote = commands.add_parser(
        "promote",
        help="make a version the champion by hand",
        description="Move the alias `champion`. The flow `retrain` does it through its gate; by hand, say why.",
    )
    promote.add_argument("name", help="registered model")
    promote.add_argument("version", type=int)
    promote.add_argument("--reason", required=True, help="kept with the version")
    _add_store(promote)
    promote.set_defaults(command=_promote)

    rollback = commands.add_parser(
        "rollback",
        help="make the previous champion the champion again",
        description="The previous champion is the champion again, in one write; who, when and why is kept with the "
        "version that was taken back. A second one in a row is refused: `dapo promote` brings a version back.",
    )
    rollback.add_argument("name", help="registered model")
    rollback.add_argument("--reason", default="", help="kept with the version that is rolled back")
    _add_store(rollback)
    rollback.set_defaults(command=_rollback)


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tracking-uri", help="MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db of the runs)"
    )
    parser.add_argument("--run-root", default="runs", help="folder of runs (default: runs)")


def _store(arguments: argparse.Namespace) -> str:
    from dapo.eval.runs import store

    return store(arguments.tracking_uri, arguments.run_root)


def _evaluate(arguments: argparse.Namespace) -> int:
    from dapo.config import io
    from dapo.eval.models import find_model
    from dapo.observe.registry import one_sentence
    from dapo.observe.shipper import tracking_uri
    from tasks import inputs
    from tasks.measure import measure

    config = io.load(arguments.config, arguments.overrides)
    with one_sentence(tracking_uri(config)):
        model = find_model(arguments.model, config)
    try:
        found = measure(config, model, Path(arguments.data) if arguments.data else None, _Progress().of)
    finally:
        inputs.abort_all()
    if found.before:
        print("measured before: the same weights answered the same questions")
    measured = found.numbers
    metrics = measured["metrics"]
    print(f"\n{arguments.model}: {metrics['val/prompts']} prompts of {config.data.validation_split}")
    for name, e in measured["estimates"].items():
        print(f"  {name:<10} {e['value']:.4f}   95 %: {e['low']:.4f} to {e['high']:.4f}")
    for name in ("format", "length_mean", "truncated", "failed"):
        print(f"  {name:<10} {metrics[f'val/{name}']:.4f}")
    print(f"  answers    {found.folder.page}")
    print(f"  MLflow     {found.record}")
    return 0


def _retrain(arguments: argparse.Namespace) -> int:
    from dapo.config import io
    from dapo.observe.registry import one_sentence
    from dapo.observe.shipper import tracking_uri
    from flows.local import retrain_here

    config = io.load(arguments.config, arguments.overrides)
    if not config.mlflow.registered_model:
        raise ConfigError("retrain needs a registered model: add mlflow.registered_model=NAME, for example dapo-geo3k")
    parameters = {"config_path": arguments.config, "config": config}
    parameters |= {"because": arguments.because, "gate_overrides": arguments.gate}
    with one_sentence(tracking_uri(config)):
        print(retrain_here(config, parameters))
    return 0


class _Progress:
    """A line every few seconds."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def of(self, what: str) -> Any:
        def say(done: int, total: int, words: str) -> None:
            if time.monotonic() - self._said > 5:
                self._said = time.monotonic()
                print(f"{what}: {done}/{total} {words}" if total else f"{what}: {words}", flush=True)

        return say


def _compare(arguments: argparse.Namespace) -> int:
    from dapo.eval.comparison_page import compare_runs
    from dapo.observe.registry import one_sentence

    with one_sentence(uri := _store(arguments)):
        text, page = compare_runs(arguments.runs, uri, arguments.run_root, arguments.out)
    print(text)
    print(f"\n{page}")
    return 0


def _models(arguments: argparse.Namespace) -> int:
    from dapo.observe.registry import Registry, one_sentence

    registry = Registry(_store(arguments), arguments.name)
    with one_sentence(registry.uri):
        aliases, versions = registry.aliases(), registry.versions()
    if not versions:
        raise ConfigError(f"no model {arguments.name} is registered in {registry.uri}")
    for version in versions:
        named = ", ".join(alias for alias, number in aliases.items() if number == version.version)
        tags = version.tags
        verdict = " ".join(tags[t] for t in ("gate.decision", "gate.difference") if t in tags)
        print(
            f"{version.version:>4}  {named:<28}  {tags.get('dapo.run_id', '')} step {tags.get('checkpoint.step', '')}"
        )
        print(f"      {tags['checkpoint.uri']}" + (f"\n      {verdict}: {tags['gate.reasons']}" if verdict else ""))
        if "rollback.at" in tags:
            at, by, to, why = (tags.get(f"rollback.{key}", "") for key in ("at", "by", "to", "reason"))
            print(f"      taken back at {at} by {by}, for version {to}" + (f"; {why}" if why else ""))
    return 0


def _register(arguments: argparse.Namespace) -> int:
    from dapo.config import io
    from dapo.eval.models import checkpoint_of
    from dapo.eval.register import register
    from dapo.observe.registry import one_sentence
    from dapo.observe.run_folder import RunFolder
    from dapo.observe.shipper import tracking_uri

    place = arguments.checkpoint.resolve()
    checkpoint = checkpoint_of(place) if (place / "journal.jsonl").is_file() else place
    if not (checkpoint / "manifest.json").is_file():
        raise ConfigError(f"{checkpoint} is not a checkpoint of a run; give RUN/checkpoints/step-... or a run's folder")
    config = io.load(RunFolder(checkpoint.parent.parent).config)
    with one_sentence(tracking_uri(config)):
        version = register(checkpoint, config, arguments.name)
    print(f"{version.reference}: {version.tags['checkpoint.uri']}")
    return 0


def _promote(arguments: argparse.Namespace) -> int:
    from dapo.observe.registry import CHAMPION, Registry, one_sentence

    registry = Registry(_store(arguments), arguments.name)
    with one_sentence(registry.uri):
        version, now = registry.require(arguments.version), registry.get(CHAMPION)
        registry.promote(version, over=now)
        registry.tag(version, {"promoted.by_hand": arguments.reason})
    print(f"{arguments.name}: champion is version {version.version}" + (f", was {now.version}" if now else ""))
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    from dapo.observe.registry import Registry, one_sentence

    registry = Registry(_store(arguments), arguments.name)
    with one_sentence(registry.uri):
        was, now = registry.rollback(arguments.reason)
    print(f"{arguments.name}: champion is version {now.version} again, was {was.version}; {now.tags['checkpoint.uri']}")
    return 0
