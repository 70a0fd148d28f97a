"""Journal to MLflow: every parameter, metric, table and checkpoint exactly once, however often MLflow goes away.

The shipper remembers in `mlflow.json` how far it came, and asks MLflow what is there before it creates anything, so a
process killed between the two repeats nothing. Identical metric points sent twice are one point to MLflow. Training
never waits for it.
"""

from __future__ import annotations

import base64
import contextvars
import io
import json
import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo.config.run import RunConfig
from dapo.files import write_whole
from dapo.observe import manifest
from dapo.observe.journal import Event, follow, read
from dapo.observe.run_folder import RunFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

MAX_PARAM_CHARS = 6000  # MLflow cuts longer values silently
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def tracking_uri(config: RunConfig) -> str:
    """The configured store, else MLFLOW_TRACKING_URI, else SQLite in `run_root`."""
    default = f"sqlite:///{Path(config.run_root).resolve() / 'mlflow.db'}"
    return config.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def connect(uri: str) -> MlflowClient:
    """A client that gives up within seconds, not minutes, where MLflow is away."""
    # MLflow's own default is to try seven times over four minutes inside one call.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    asked = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)  # create_external_model knows no other way
    # It also sets the variable, which the next configuration without a store of its own would take for the user's word.
    if asked is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    else:
        os.environ["MLFLOW_TRACKING_URI"] = asked
    return mlflow.MlflowClient(uri)


def experiment_id(client: MlflowClient, config: RunConfig) -> str:
    """The configured experiment, made where there is none; on SQLite its artifacts lie in `run_root`."""
    name = config.mlflow.experiment
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = tracking_uri(config).startswith("sqlite:")
    place = f"{Path(config.run_root).resolve() / 'mlartifacts'}" if local else None
    return str(client.create_experiment(name, artifact_location=place))


class Shipper:
    """Sends one run's journal to MLflow; `start` does so in a thread until `close`."""

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        self.folder, self.config, self.uri = folder, config, tracking_uri(config)
        self._client: MlflowClient | None = None
        self._state: dict[str, Any] = json.loads(folder.mlflow.read_text()) if folder.mlflow.exists() else {"offset": 0}
        if self._state.get("tracking_uri", self.uri) != self.uri:
            self._state = {"offset": 0}  # another store: it gets everything from the beginning
        self._end = threading.Event()
        # What it logs belongs to the flow run that started it, which a thread does not know by itself.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._loop,), daemon=True, name="mlflow-shipper")

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, once something was shipped."""
        return self._state.get("run_id")

    def start(self) -> Shipper:
        self._thread.start()
        return self

    def close(self, wait_s: float = 60.0) -> bool:
        """Ship the rest; False where MLflow did not answer in time (what is missing is shipped by the next start)."""
        self._end.set()
        self._thread.join(wait_s)
        written = self.folder.journal.stat().st_size if self.folder.journal.exists() else 0  # none: it never began
        return not self._thread.is_alive() and self._state["offset"] == written

    def ship(self) -> int:
        """Send what is new; returns how many events. Raises whatever MLflow raises when it is away."""
        sent = 0
        pending: list[tuple[Event, int]] = []
        for event, offset in follow(self.folder.journal, self._state["offset"]):
            pending.append((event, offset))
            if event.kind not in ("step", "progress") or len(pending) == 50:
                sent += self._send(pending)
                pending = []
        return sent + self._send(pending)

    def _loop(self) -> None:
        pause = 2.0
        while True:
            last = self._end.is_set()
            try:
                self.ship()
                pause = 2.0
            except Exception as error:
                # MLflow's client raises its own, requests', SQLAlchemy's and OS errors; the answer to all is: later.
                pause = min(pause * 2, 300.0)
                log.warning(
                    "MLflow at %s does not answer (%s: %s); the journal keeps everything, next try in %.0f s",
                    *(self.uri, type(error).__name__, str(error).splitlines()[0] if str(error) else "", pause),
                )
            if last:
                return
            self._end.wait(pause)

    def _send(self, pending: list[tuple[Event, int]]) -> int:
        if not pending:
            return 0
        client, run_id = self._connected()
        from mlflow.entities import Metric

        points = [
            Metric(name, float(value), int(event.time * 1000), event.step)
            for event, _ in pending
            if event.kind in ("step", "validation")
            for name, value in event.data["metrics"].items()
        ]
        for i in range(0, len(points), 1000):
            client.log_batch(run_id, metrics=points[i : i + 1000])
        for event, _ in pending:
            match event.kind:
                case "validation":
                    self._table(client, run_id, event)
                case "checkpoint":
                    self._model(client, run_id, event)
                case "alarm":
                    client.set_tag(run_id, f"alarm.{event.data['name']}", f"step {event.step}: {event.data['message']}")
                case "started" if event.data["attempt"] > 1:
                    client.set_tag(run_id, f"resume.{event.data['attempt']}", f"from step {event.step}")
                case "ended":
                    client.set_terminated(run_id, STATUS[event.data["status"]])
        self._state["offset"] = pending[-1][1]
        self._remember()
        return len(pending)

    def _connected(self) -> tuple[MlflowClient, str]:
        if self._client is None:
            self._client = connect(self.uri)
        if self.run_id is None:
            run_id = self._find_or_create(self._client)
            experiment = str(self._client.get_run(run_id).info.experiment_id)
            self._state |= {"tracking_uri": self.uri, "run_id": run_id, "experiment_id": experiment}
            self._remember()
        return self._client, self._state["run_id"]

    def _find_or_create(self, client: MlflowClient) -> str:
        folder, experiment = self.folder, experiment_id(client, self.config)
        # The manifest is written once: a run started again after its folder was removed has another time.
        key = folder.manifest.stat().st_mtime_ns
        found = client.search_runs([experiment], f"tags.`dapo.run_key` = '{folder.id}/{key}'")
        if found:
            return str(found[0].info.run_id)
        saved = manifest.read(folder)
        tags = {
            "dapo.run_id": folder.id,
            "dapo.run_key": f"{folder.id}/{key}",
            "dapo.run_folder": str(folder.root),
            "mlflow.source.git.commit": saved.get("code", {}).get("commit", ""),
            **{f"package.{n}": v for n, v in saved.get("packages", {}).items()},
        }
        run_id = str(client.create_run(experiment, run_name=folder.id, tags=tags).info.run_id)
        self._describe(client, run_id, saved)
        return run_id

    def _describe(self, client: MlflowClient, run_id: str, saved: dict[str, Any]) -> None:
        """Parameters, configuration, manifest and the data set with its digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        flat = _flat(self.config.model_dump(mode="json"))
        client.log_batch(run_id, params=[Param(k, str(v)[:MAX_PARAM_CHARS]) for k, v in flat.items()])
        client.log_dict(run_id, self.config.model_dump(mode="json"), "config.yaml")
        client.log_dict(run_id, saved, "manifest.json")
        data = saved.get("data", {})
        if path := data.get("path"):
            digest = str(data.get("digest") or data.get("key") or Path(path).name)[:36]
            source = json.dumps({"uri": path, **{k: data[k] for k in ("source", "revision") if k in data}}, default=str)
            dataset = Dataset(name=Path(path).name, digest=digest, source_type="local", source=source)
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _table(self, client: MlflowClient, run_id: str, event: Event) -> None:
        """Validation answers with their images, as a table of MLflow's, and the verdicts on all prompts."""
        artifact = f"validation/step-{event.step:06d}.json"
        path = self.folder.root / event.data["table"]
        if not path.exists() or any(a.path == artifact for a in client.list_artifacts(run_id, "validation")):
            return
        import pandas
        from mlflow import Image
        from PIL import Image as Pillow

        results = self.folder.validation_results(event.step)
        if results.exists():
            client.log_artifact(run_id, str(results), "validation")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            images = row.pop("images", [])
            image = Pillow.open(io.BytesIO(base64.b64decode(images[0]))).convert("RGB") if images else None
            row["image"] = Image(image) if image else None
        if rows:
            client.log_table(run_id, pandas.DataFrame(rows), artifact)

    def _model(self, client: MlflowClient, run_id: str, event: Event) -> None:
        """A checkpoint as a logged model: by reference, never copied through the tracking server."""
        import mlflow
        from mlflow.entities import Metric

        experiment = client.get_run(run_id).info.experiment_id
        name = f"{self.folder.id}-step-{event.step}"
        found = client.search_logged_models([experiment], f"name = '{name}' AND source_run_id = '{run_id}'")
        if found:
            model = found[0]
        else:
            uri = (self.folder.root / event.data["path"] / "hf").as_uri()
            model = mlflow.create_external_model(
                name=name,
                source_run_id=run_id,
                experiment_id=experiment,
                params={"step": str(event.step)},
                tags={"checkpoint.uri": uri, "checkpoint.best": str(event.data["best"])},
                model_type="checkpoint",
            )
        # The same point as the validation's (name, step, time): linked to the model, not logged a second time.
        at = int(
            next(
                (e.time for e in read(self.folder.journal) if (e.kind, e.step) == ("validation", event.step)),
                event.time,
            )
            * 1000
        )
        points = [
            Metric(key, float(value), at, event.step, model_id=model.model_id, run_id=run_id)
            for key, value in event.data["metrics"].items()
        ]
        if points:
            client.log_batch(run_id, metrics=points)

    def _remember(self) -> None:
        write_whole(self.folder.mlflow, json.dumps(self._state))


def log_artifacts(folder: RunFolder, config: RunConfig, files: Iterable[Path], under: str | None = None) -> None:
    """Add finished files (report, plots) to the run's MLflow artifacts, in the folder `under`."""
    state = json.loads(folder.mlflow.read_text())
    client = connect(tracking_uri(config))
    for file in files:
        client.log_artifact(state["run_id"], str(file), under)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
