"""The command `dapo`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dapo import lifecycle, services
from dapo.errors import ConfigError, DapoError, EngineError, TrainingError

EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 130
_DEFAULT = "configs/geo3k_tiny.yaml"
_OVERRIDES = "dotted keys over the file, for example train.steps=5 model.optimizer.lr=2e-6"


def main(argv: Sequence[str] | None = None, prog: str = "dapo") -> int:
    """Parse and run; an error is one sentence, with exit code 2 if the user can fix it, 1 if something broke."""
    arguments = _parser(prog).parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except DapoError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return EXIT_FAILED if isinstance(error, _BROKE) else EXIT_REFUSED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="DAPO post-training as a pipeline.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="train: the whole flow on this machine, or with its job on a cluster",
        description="Run the flow `dapo`: prepare data and weights, check the machine, train, report. Run again with "
        "the same configuration it goes on where it stopped and skips what is done. Ctrl-C stops it with a checkpoint.",
    )
    run.add_argument("config", nargs="?", default=_DEFAULT, help="YAML file (default: %(default)s)")
    run.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    run.set_defaults(command=_run)

    plan = commands.add_parser(
        "plan",
        help="show what a configuration means and whether it can run here; start nothing",
        description="Print the resolved configuration, the numbers that follow from it, and the checks of this "
        "machine. Exit code 2 where a check fails.",
    )
    plan.add_argument("config", help="YAML file")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    plan.set_defaults(command=_plan)

    doctor = commands.add_parser(
        "doctor", help="check this machine", description="Check this machine for a configuration (default: any)."
    )
    doctor.add_argument("config", nargs="?", help="YAML file; without it: what every run needs")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    doctor.set_defaults(command=_doctor)

    report = commands.add_parser(
        "report", help="write a run's report", description="Write report.html of a run, finished or not."
    )
    _add_run(report, required=True)
    report.set_defaults(command=_report)

    status = commands.add_parser(
        "status", help="list the runs here, or show the progress of one", description="Runs and their progress."
    )
    _add_run(status, required=False)
    status.set_defaults(command=_status)

    reward = commands.add_parser("reward", help="test a reward function", description="Commands for rewards.")
    actions = reward.add_subparsers(required=True, metavar="ACTION")
    test = actions.add_parser(
        "test",
        help="check a reward before a run trusts it",
        description="Grade known, empty, huge and strange responses with a reward, in a process of its own as in "
        "training. Exit code 1 where a check fails.",
    )
    test.add_argument("function", nargs="?", help="module:name (default: that of a configuration without one)")
    test.add_argument("--golden", type=Path, metavar="FILE", help="JSON list of response, answer, accuracy")
    test.add_argument("--deadline-s", type=float, metavar="SECONDS", help="allowed per check (default: as in training)")
    test.set_defaults(command=_test_reward)

    lifecycle.add_commands(commands)
    services.add_commands(commands)
    return parser


def _add_run(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "run", nargs=None if required else "?", help="a run's folder, its id, or the beginning of its id"
    )
    parser.add_argument("--run-root", default="runs", help="folder that holds the runs (default: runs)")


def _run(arguments: argparse.Namespace) -> int:
    from dapo.config import io
    from dapo.observe.run_folder import RunFolder
    from dapo.plan import checks
    from dapo.plan.check_table import refuse

    if "=" in arguments.config:  # overrides alone
        arguments.overrides.insert(0, arguments.config)
        arguments.config = _DEFAULT
    config = io.load(arguments.config, arguments.overrides)
    refuse(config.name, checks.machine(config))
    from rich.console import Console

    from dapo.terminal import LiveView, closing
    from flows.local import output_kept_in, run_here

    folder = RunFolder.of(config)
    log = folder.root / "flow.log"
    derived = ", ".join(f"{name} {value}" for name, value in config.derived().items())
    with output_kept_in(log) as (out, _), open(out, "w", closefd=False) as terminal:
        console = Console(file=terminal, soft_wrap=True)
        console.print(f"{folder.id}\n  {derived}\n  folder {folder.root}", markup=False, highlight=False)
        view = LiveView(console, folder, config)
        view.start()
        try:
            # Read once: the file may be edited while the server starts.
            status = run_here(config, {"config_path": arguments.config, "config": config}, view.stage)
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from the last checkpoint", markup=False)
            raise
        except DapoError:
            raise
        except Exception as error:
            import traceback

            traceback.print_exc()
            raise _Unexpected(f"unexpected {type(error).__name__}: {error}. Trace in {log}") from error
        finally:
            view.stop()
        for line in closing(folder, config):
            console.print(line, markup=False, highlight=False)
    return 0 if status == "finished" else EXIT_FAILED


class _Unexpected(DapoError):
    """An unexpected error as one sentence, with the path of its traceback."""


_BROKE = (TrainingError, EngineError, _Unexpected)
"""Ended after it had begun; all other errors of ours refuse to begin."""


def _plan(arguments: argparse.Namespace) -> int:
    import yaml

    from dapo.config import io
    from dapo.observe.run_folder import run_id

    config = io.load(arguments.config, arguments.overrides)
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    print(f"run {run_id(config)}")
    for name, value in config.derived().items():
        print(f"  {name:<28}{value}")
    print()
    return _check(config)


def _doctor(arguments: argparse.Namespace) -> int:
    from dapo.config import io
    from dapo.config.run import RunConfig

    return _check(io.load(arguments.config, arguments.overrides) if arguments.config else RunConfig())


def _check(config: object) -> int:
    from dapo.config.run import RunConfig
    from dapo.plan import checks
    from dapo.plan.check_table import failed, table, verdict

    assert isinstance(config, RunConfig)
    found = checks.machine(config)
    print(table(found))
    print(f"\n{verdict(found)}")
    return EXIT_REFUSED if failed(found) else 0


def _report(arguments: argparse.Namespace) -> int:
    from dapo.observe.report import write_report
    from dapo.observe.run_folder import RunFolder

    print(write_report(RunFolder(_find_run(arguments))))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from dapo.observe.journal import read
    from dapo.observe.run_folder import RunFolder
    from dapo.terminal import step_line

    root = Path(arguments.run_root)
    if arguments.run is None:
        folders = sorted(root.glob("*/journal.jsonl"), key=lambda p: p.stat().st_mtime)
        if not folders:
            raise ConfigError(f"no runs in {root.resolve()}; `dapo run configs/geo3k_tiny.yaml` makes one")
        roots = [path.parent for path in folders]
    else:
        roots = [_find_run(arguments)]
    for place in roots:
        events = list(read(RunFolder(place).journal))
        started = [e for e in events if e.kind == "started"]
        total = started[-1].data["total_steps"] if started else 0
        steps = [e for e in events if e.kind == "step"]
        validations = [e for e in events if e.kind == "validation"]
        last = events[-1] if events else None
        if last is None:
            state = "not started"
        elif last.kind == "ended":
            state = f"{last.data['status']}: {last.data['reason']}"
        else:
            state = f"running or killed; last word {_ago(last.time)} ago"
        print(f"{place.name}  step {steps[-1].step if steps else 0}/{total}  {state}")
        if arguments.run is not None:
            for event in validations:
                print(f"  validation at step {event.step}: accuracy {event.data['metrics']['val/accuracy']:.3f}")
            for event in steps[-3:]:
                print(f"  {step_line(event, total)}")
            print(f"  inputs {json.loads(RunFolder(place).inputs.read_text())}")
    return 0


def _ago(moment: float) -> str:
    import time

    from dapo.terminal import duration

    return duration(time.time() - moment)


def _test_reward(arguments: argparse.Namespace) -> int:
    from dapo.rewards.selftest import report

    passed = report(arguments.function, golden=arguments.golden, deadline_s=arguments.deadline_s)
    return 0 if passed else EXIT_FAILED


def _find_run(arguments: argparse.Namespace) -> Path:
    """A folder with a journal, or the one run in the root whose id begins so."""
    given = Path(arguments.run)
    if (given / "journal.jsonl").is_file():
        return given.resolve()
    root = Path(arguments.run_root)
    found = sorted(path.parent for path in root.glob(f"{given.name}*/journal.jsonl"))
    if len(found) == 1:
        return found[0].resolve()
    names = ", ".join(path.name for path in (found or sorted(p.parent for p in root.glob("*/journal.jsonl"))))
    what = "several runs begin so" if found else "no run of that name"
    raise ConfigError(
        f"{arguments.run}: {what} in {root.resolve()}; {f'there are: {names}' if names else 'it is empty'}"
    )


if __name__ == "__main__":
    sys.exit(main())
