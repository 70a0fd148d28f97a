"""Takes the screenshots in docs/pictures: `PYTHONPATH=. python docs/screenshots.py WORK [train.steps=20 ...]`.

Trains the tiny configuration twice (another learning rate the second time) with a Prefect server of its own, evaluates
and compares the two, starts MLflow, and photographs Prefect's, MLflow's and our pages. WORK keeps runs, cache and
databases: called again with the same overrides, what is trained is not trained again. Needs Chromium or Chrome.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from browser import Page, browser, find_browser

from dapo.config import io
from dapo.observe.run_folder import RunFolder
from dapo.runtime.cluster import free_port
from dapo.runtime.telemetry import TELEMETRY_OFF

PICTURES = Path(__file__).parent / "pictures"
REPOSITORY = Path(__file__).parents[1]
CONFIG = "configs/geo3k_tiny.yaml"
RUNS = (("geo3k-tiny", ()), ("geo3k-tiny-fast", ("model.optimizer.lr=6e-5",)))
EVALUATION = ("validation.samples=4",)
START_S = 120.0
# A panel that covers a third of MLflow's pages; its last button is in the corner.
_CLOSE_ASSISTANT = """(() => {
    const place = b => b.getBoundingClientRect();
    const corner = b => place(b).top < 80 && place(b).left > innerWidth - 70 && place(b).width;
    if (document.body.innerText.includes('MLflow Assistant'))
        [...document.querySelectorAll('button')].filter(corner).forEach(b => b.click());
})()"""
_ONLY_CHARTS_OF = """(() => {
    document.head.insertAdjacentHTML('beforeend', '<style>.modebar { display: none !important }</style>');
    const field = document.querySelector('input[placeholder="Search metric charts"]');
    Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(field, %s);
    field.dispatchEvent(new Event('input', {bubbles: true}));
})()"""


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    find_browser()
    work = Path(sys.argv[1]).resolve()
    places = (f"run_root={work / 'runs'}", f"data.cache_dir={work / 'cache'}", *sys.argv[2:])
    configs = [io.load(CONFIG, [f"name={name}", *own, *places]) for name, own in RUNS]
    folders = [RunFolder.of(config) for config in configs]
    runs = [json.loads(f.mlflow.read_text())["run_id"] for f in _trained(work, configs, folders)]
    evaluation = _say("evaluate", str(folders[1].root), str(folders[1].config), *EVALUATION)
    page = next(Path(word) for word in evaluation.split() if word.endswith("evaluation.html"))
    comparison = work / "runs" / "comparisons" / "pictures.html"
    _say("compare", *runs, "--run-root", str(work / "runs"), "--out", str(comparison))
    PICTURES.mkdir(exist_ok=True)
    with browser() as tab:
        _ours(tab, folders[1].report, comparison, page)
        with _prefect(work) as api:
            _prefect_pages(tab, api, folders[1].id)
        with _mlflow(work) as uri:
            _mlflow_pages(tab, uri)
    for picture in sorted(PICTURES.glob("*.png")):
        print(f"{picture.stat().st_size / 1024:7.0f} KiB  {picture}")
    return 0


def _ours(tab: Page, report: Path, comparison: Path, evaluation: Path) -> None:
    tab.open(report.as_uri(), "Curves")
    tab.picture(PICTURES / "report.png", height=_place(tab, "Answers before and after"), whole=True)
    start = _place(tab, "Answers before and after")
    tab.picture(PICTURES / "report-answers.png", height=_place(tab, "Checkpoints") - start, top=start)
    tab.open(comparison.as_uri(), "Curves")
    tab.picture(PICTURES / "comparison.png", height=_place(tab, "At equal training steps"), whole=True)
    tab.open(evaluation.as_uri(), "Answers")
    tab.picture(PICTURES / "samples.png", height=1500, whole=True)


def _prefect_pages(tab: Page, api: str, run: str) -> None:
    flows = _ask(f"{api}/flow_runs/filter", {"flows": {"name": {"any_": ["dapo"]}}, "sort": "START_TIME_DESC"})
    flow = next(f for f in flows if run.rpartition("-")[0] in f["name"] and f["state_type"] == "COMPLETED")
    site = api.removesuffix("/api")
    tab.open(f"{site}/runs/flow-run/{flow['id']}", "Task Runs", settle_s=6)
    tab.click("li", "Task Runs")
    time.sleep(4)
    tab.picture(PICTURES / "prefect-run.png")


def _mlflow_pages(tab: Page, uri: str) -> None:
    experiment = _ask(f"{uri}/api/2.0/mlflow/experiments/get-by-name?experiment_name=dapo")["experiment"]
    number = experiment["experiment_id"]
    which = urllib.parse.quote("attributes.run_name LIKE 'geo3k-tiny%'")  # not the evaluations
    tab.open(
        f"{uri}/#/experiments/{number}/runs?compareRunsMode=CHART&searchFilter={which}", "matching runs", settle_s=4
    )
    tab.run(_CLOSE_ASSISTANT)
    tab.run(_ONLY_CHARTS_OF % json.dumps("^(val/(accuracy|format|length_mean)|train/(entropy|grad_norm|loss))$"))
    tab.wait_for("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 12")
    time.sleep(2)
    tab.picture(PICTURES / "mlflow-comparison.png")


def _place(tab: Page, heading: str) -> int:
    """Pixels above a heading of our pages."""
    script = f"[...document.querySelectorAll('h2')].find(e => e.innerText === {json.dumps(heading)})"
    return int(tab.run(f"Math.floor({script}.getBoundingClientRect().top + window.scrollY)"))


def _trained(work: Path, configs: list[Any], folders: list[RunFolder]) -> list[RunFolder]:
    with _prefect(work) as api:
        for config, folder in zip(configs, folders, strict=True):
            folder.root.mkdir(parents=True, exist_ok=True)
            io.save(config, folder.config)
            _say("run", str(folder.config), PREFECT_API_URL=api)
    return folders


def _say(*command: str, **env: str) -> str:
    """Runs `dapo ...`, shows what it prints and returns it."""
    print(f"$ dapo {' '.join(command)}", flush=True)
    child = subprocess.Popen(
        [sys.executable, "-m", "dapo.cli", *command],
        cwd=REPOSITORY,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if child.wait():
        raise SystemExit(f"dapo {command[0]} failed")
    return "".join(lines)


@contextmanager
def _prefect(work: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    env = {"PREFECT_HOME": str(work / "prefect"), "PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api"}
    with _server(command, env, work / "prefect.log", f"http://127.0.0.1:{port}/api/health"):
        yield f"http://127.0.0.1:{port}/api"


@contextmanager
def _mlflow(work: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{work / 'runs' / 'mlflow.db'}"]
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with _server(command, env, work / "mlflow.log", f"http://127.0.0.1:{port}/health"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _server(command: list[str], env: dict[str, str], log: Path, health: str) -> Iterator[None]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=os.environ | TELEMETRY_OFF | env, stdout=output, stderr=output, start_new_session=True
        )
    try:
        end_at = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(health, timeout=2):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > end_at:
                    raise SystemExit(f"{' '.join(command[1:4])} does not start; see {log}") from None
                time.sleep(0.3)
        yield
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def _ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as answer:
        return json.loads(answer.read())


if __name__ == "__main__":
    sys.exit(main())
