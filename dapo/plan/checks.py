"""Can this machine, or this cluster, run this configuration? Each answer has a reason and, where needed, a remedy.

machine   in a second, before anything is fetched or started
inputs    once data and weights are there
cluster   once Ray is there
"""

from __future__ import annotations

import glob
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dapo.config.run import RunConfig
from dapo.data.remote import is_url, probe
from dapo.errors import EnvironmentCheckError
from dapo.plan import machine as here
from dapo.plan import npu, variables
from dapo.plan.check_table import Check, fail, ok, skip, warn
from dapo.plan.machine import GIB, Size

# Ray, Prefect, the flow, the trainer's libraries: what a run takes before its model.
_PROCESSES = 2.5 * GIB
_HUB = "https://huggingface.co"


def machine(config: RunConfig) -> list[Check]:
    """Everything that this machine alone can answer."""
    env = {**os.environ, **config.ray.preload, **config.ray.env}
    size = here.size_by_name(config)
    local = config.ray.address is None
    accelerated = config.device in ("npu", "cuda") or npu.present() or bool(glob.glob("/dev/nvidia[0-9]*"))
    return [
        here.python(),
        here.packages(),
        here.cores(),
        _device(config),
        _memory(config, size, accelerated) if local else skip("memory", "training runs on a cluster"),
        *_disks(config, size),
        here.shared_memory((8 if accelerated else 0.25) * GIB)
        if local
        else skip("/dev/shm", "training runs elsewhere"),
        here.limits(accelerated),
        here.tuning(accelerated and local),
        *_hubs(config),
        *_storage(config),
        variables.obsolete(env, config.device == "npu"),
        variables.preload(config),
        *npu.checks(config, env),
    ]


def inputs(config: RunConfig, data: Path, weights: Path) -> list[Check]:
    """Prepared data and weights are whole and fit the configuration."""
    return [_data(config, data), *_weights(config, weights)]


def cluster(config: RunConfig, nodes: Sequence[Mapping[str, Any]], pids: Sequence[int] = ()) -> list[Check]:
    """The Ray cluster has the devices.

    Args:
        config: the run.
        nodes: living nodes, each with `resources_total`.
        pids: processes of a local Ray, to look into.
    """
    world = config.devices
    have = {name: sum(float(node["resources_total"].get(name, 0)) for node in nodes) for name in ("CPU", "GPU", "NPU")}
    reason = f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}: " + ", ".join(
        f"{count:.0f} {name}" for name, count in have.items() if count
    )
    wanted = {"npu": "NPU", "cuda": "GPU"}.get(config.device)
    if wanted is None:
        devices = ok("Ray cluster", reason)
    elif have[wanted] < world:
        hint = "ray start --resources='{\"NPU\": 16}'" if wanted == "NPU" else "ray start --num-gpus=8"
        devices = fail(
            "Ray cluster",
            f"{reason}; model.parallel.world_size={world - config.rollout.devices} and rollout.devices="
            f"{config.rollout.devices} need {world} {wanted}",
            f"join more nodes (where Ray cannot count: {hint}), or lower model.parallel.world_size",
        )
    else:
        devices = ok("Ray cluster", reason)
    preloaded = (
        variables.mapped(config, pids)
        if config.ray.address is None
        else skip("LD_PRELOAD of workers", "the workers of a cluster check it themselves when they start")
    )
    return [devices, preloaded]


def _device(config: RunConfig) -> Check:
    """The named device is here; nothing is imported for it. NPUs have rows of their own."""
    if config.ray.address is not None:
        return skip("device", f"{config.device} is looked for on the cluster at {config.ray.address}")
    gpus = len(glob.glob("/dev/nvidia[0-9]*"))
    here_are = ", ".join([*(["NPU"] if npu.present() else []), *([f"{gpus} GPU"] if gpus else []), "CPU"])
    if config.device == "cuda":
        world = config.devices
        remedy = "device=auto takes the best one present; configs/geo3k_tiny.yaml runs on any CPU"
        if not gpus:
            return fail("device", f"device=cuda, and this machine has: {here_are}", remedy)
        if "cpu" in (here.installed("torch") or ""):
            return fail("device", "device=cuda, and torch is built for CPU", "install the CUDA build (README)")
        if gpus < world:
            return fail("device", f"{gpus} GPUs, {world} needed", f"model.parallel.world_size={gpus}")
    if config.device == "npu" and not npu.present():
        return fail(
            "device",
            f"device=npu, and this machine has: {here_are} (no /dev/davinci*)",
            "run where NPUs are (ray.address of a cluster, docker run --device /dev/davinci0 ...), or a configuration "
            "for this machine: configs/geo3k_tiny.yaml",
        )
    return ok("device", f"device={config.device}; this machine has: {here_are}")


def _memory(config: RunConfig, size: Size | None, accelerated: bool) -> Check:
    if size is None:
        return skip("memory", "the size of the model is not known before it is fetched")
    if accelerated:
        state = 8 * size.parameters if config.model.parallel.offload_optimizer else 0.0
        return here.memory(state + size.weights + 20 * GIB, "engine's copy, offloaded optimiser, processes")
    # float32 weights, gradients and two moments, and the engine's copy.
    return here.memory(20 * size.parameters + _PROCESSES, "weights, gradients, optimiser, engine's copy, processes")


def _disks(config: RunConfig, size: Size | None) -> list[Check]:
    cache, runs = Path(config.data.cache_dir), Path(config.run_root)
    data = 0.1 * GIB if config.data.source.kind == "synthetic" else 2 * GIB
    if size is None:
        return [here.disk("disk: cache", cache, data, "prepared data"), here.disk("disk: runs", runs, GIB, "journal")]
    fetched = size.weights if config.model.source.kind == "hub" else 0.02 * GIB
    kept = config.train.keep_checkpoints + 2  # the best one, and the one being written
    return [
        here.disk("disk: cache", cache, fetched + data, "weights and prepared data"),
        here.disk("disk: runs", runs, kept * size.checkpoint + 0.2 * GIB, f"{kept} checkpoints"),
    ]


def _hubs(config: RunConfig) -> list[Check]:
    """The hubs that data and weights come from can be reached, or the cache is said to be enough."""
    sources = [s for s in (config.data.source, config.model.source) if s.kind == "hub"]
    if not sources:
        return [skip("hub", "nothing comes from one")]
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return [ok("hub", "HF_HUB_OFFLINE is set: only what is cached is used")]
    found = []
    for place in dict.fromkeys(s.endpoint or os.environ.get("HF_ENDPOINT", _HUB) for s in sources):
        url = urlsplit(place)
        if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
            found.append(skip("hub", f"{place} is behind a proxy"))
            continue
        try:
            socket.create_connection((url.hostname or "", url.port or (80 if url.scheme == "http" else 443)), 5).close()
            found.append(ok("hub", f"{place} answers"))
        except OSError as error:
            found.append(
                warn(
                    "hub",
                    f"{place} does not answer ({error}); fetching works only from the cache",
                    "set HF_ENDPOINT to a mirror, or data.source / model.source to a local folder",
                )
            )
    return found


def _storage(config: RunConfig) -> list[Check]:
    """What the configuration names by a URL can be used from here."""
    places = [
        ("train.mirror", config.train.mirror, True),
        ("data.source.path", getattr(config.data.source, "path", None), False),
        ("model.source.path", getattr(config.model.source, "path", None), False),
    ]
    found = []
    for key, url, write in places:
        if url is None or not is_url(url):
            continue
        try:
            found.append(ok(key, f"{url}: {probe(url, write)}"))
        except EnvironmentCheckError as error:
            remedy = "set the credentials and endpoint in the environment (docs/operate.md), or another URL"
            found.append(fail(key, str(error), remedy))
    return found


def _data(config: RunConfig, data: Path) -> Check:
    wanted = ("train", config.data.validation_split)
    missing = [f"{split}.parquet" for split in wanted if not (data / f"{split}.parquet").is_file()]
    if missing:
        return fail("data", f"{data} has no {' and no '.join(missing)}", "remove the folder; it is prepared again")
    return ok("data", f"{', '.join(wanted)} in {data}")


def _weights(config: RunConfig, weights: Path) -> list[Check]:
    try:
        model_config = json.loads((weights / "config.json").read_text())
    except (OSError, ValueError) as error:
        return [fail("weights", f"{weights / 'config.json'}: {error}", "remove the folder; it is fetched again")]
    files = sorted(weights.glob("*.safetensors"))
    index = weights / "model.safetensors.index.json"
    wanted = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    missing = wanted - {file.name for file in files}
    if missing or not files:
        names = ", ".join(sorted(missing)) or "*.safetensors"
        return [fail("weights", f"{weights} lacks {names}", "remove the folder; it is fetched again")]
    stored = sum(file.stat().st_size for file in files)
    text = model_config.get("text_config", model_config)
    found = [ok("weights", f"{model_config.get('model_type', '?')}, {stored / GIB:.2f} GiB in {weights}")]
    heads, kv_heads = text.get("num_attention_heads"), text.get("num_key_value_heads")
    sequence, tensor = config.model.parallel.sequence_parallel, config.rollout.tensor_parallel
    if heads and heads % sequence:
        found.append(_does_not_divide("model.parallel.sequence_parallel", sequence, "attention heads", heads))
    elif heads and heads % tensor:
        found.append(_does_not_divide("rollout.tensor_parallel", tensor, "attention heads", heads))
    elif kv_heads and tensor > kv_heads:
        found.append(
            warn(
                "heads",
                f"rollout.tensor_parallel={tensor} is more than the {kv_heads} key-value heads: each is kept "
                f"{tensor // kv_heads} times",
                f"rollout.tensor_parallel={kv_heads} needs less memory for the cache",
            )
        )
    elif heads:
        found.append(ok("heads", f"{heads} attention heads, {kv_heads} key-value heads"))
    return found


def _does_not_divide(key: str, value: int, what: str, count: int) -> Check:
    fits = [n for n in range(1, count + 1) if count % n == 0]
    near = sorted(sorted(fits, key=lambda n: abs(n - value))[:2])
    return fail("heads", f"{key}={value} does not divide the {count} {what}", f"try {' or '.join(map(str, near))}")
