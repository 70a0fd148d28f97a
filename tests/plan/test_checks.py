"""Checks of the environment: each says what it found and what to do."""

import os
import platform
from pathlib import Path

import pytest

from dapo.config import io
from dapo.config.run import RunConfig
from dapo.errors import EnvironmentCheckError
from dapo.plan import checks, machine, npu, variables
from dapo.plan.check_table import Check, refuse, table, verdict

GIB = 2**30


def config(**tree) -> RunConfig:
    return RunConfig.model_validate(tree)


def of(found, name) -> Check:
    (check,) = [c for c in found if c.name == name]
    return check


def test_this_machine_runs_the_tiny_configuration():
    found = checks.machine(io.load("configs/geo3k_tiny.yaml"))
    assert [c for c in found if c.status == "fail"] == []
    assert of(found, "NPU").status == "skip" or npu.present()


def test_places_at_urls_are_tried_out_before_anything_starts(storage, tmp_path):
    tree = {"train": {"mirror": f"{storage}/runs"}, "data": {"source": {"kind": "folder", "path": f"{storage}/none"}}}
    found = checks.machine(config(device="cpu", **tree))
    assert of(found, "train.mirror").reason == f"{storage}/runs: an object was written, read and removed"
    missing = of(found, "data.source.path")
    assert (missing.status, missing.reason) == ("fail", f"{storage}/none is empty, or not there")
    driver = of(checks.machine(config(device="cpu", train={"mirror": "gs://bucket/runs"})), "train.mirror")
    assert driver.status == "fail"
    assert "pip install gcsfs==" in driver.reason


def test_table_has_failures_first_with_their_remedies():
    rows = [Check("a", "ok", "fine"), Check("bb", "fail", "broken", "mend it"), Check("c", "warn", "odd", "look")]
    assert table(rows).splitlines() == [
        "fail  bb  broken",
        "          -> mend it",
        "warn  c   odd",
        "          -> look",
        "ok    a   fine",
    ]
    assert verdict(rows) == "1 failed, 1 warning, 1 ok"
    with pytest.raises(EnvironmentCheckError, match=r"run x cannot run here \(1 failed"):
        refuse("run x", rows)
    refuse("run x", rows[:1])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("Qwen/Qwen3-VL-30B-A3B-Instruct", 30e9), ("Qwen/Qwen2.5-VL-7B", 7e9), ("a/b-0.5B", 0.5e9), ("some/model", None)],
)
def test_size_is_read_from_the_name(name, parameters):
    size = machine.size_by_name(config(model={"source": {"kind": "hub", "repo": name}}))
    assert (size.parameters if size else None) == parameters


def test_checkpoint_of_30b_is_what_its_parts_are():
    # 4 bytes of master weights and two moments of 4 bytes each, and bfloat16 for the Hugging Face folder.
    assert machine.Size(30e9, 60e9).checkpoint == 30e9 * (4 + 4 + 4 + 2)


def test_memory_that_is_not_there_fails_with_both_numbers():
    check = machine.memory(1e15, "a test")
    assert check.status == "fail"
    assert "931322.6 GiB needed (a test)" in check.reason


def test_disk_check_looks_at_the_nearest_folder_that_exists(tmp_path):
    check = machine.disk("disk", tmp_path / "not" / "yet", 1.0, "nothing")
    assert check.status == "ok"
    assert f"free at {tmp_path}," in check.reason
    assert machine.disk("disk", tmp_path, 1e18, "much").status == "fail"


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_folder_that_may_not_be_written_fails(tmp_path):
    tmp_path.chmod(0o500)
    assert "is not writable" in machine.disk("disk", tmp_path, 1.0, "nothing").reason


def test_variables_of_the_seed_that_do_nothing_are_named():
    check = variables.obsolete({"VLLM_USE_V1": "1", "USE_OPTIMIZED_MODEL": "0", "HOME": "/"}, npu=True)
    assert check.status == "warn"
    assert "VLLM_USE_V1=1: vLLM has no other engine any more" in check.reason
    assert "USE_OPTIMIZED_MODEL=0" in check.reason
    assert variables.obsolete({"HOME": "/"}, npu=True).status == "ok"


@pytest.mark.parametrize(
    ("env", "name", "status"),
    [
        ({"HCCL_CONNECT_TIMEOUT": "60"}, "HCCL time limits", "fail"),
        ({"HCCL_CONNECT_TIMEOUT": "5400"}, "HCCL time limits", "warn"),
        ({"HCCL_CONNECT_TIMEOUT": "1200"}, "HCCL time limits", "ok"),
        ({"HCCL_OP_EXPANSION_MODE": "AIV"}, "HCCL time limits", "warn"),
        ({"HCCL_EXEC_TIMEOUT": "1868"}, "HCCL time limits", "fail"),
        ({"PYTORCH_NPU_ALLOC_CONF": "expandable_segments: True"}, "PYTORCH_NPU_ALLOC_CONF", "fail"),
        ({}, "VLLM_ASCEND_ENABLE_NZ", "fail"),
        ({"VLLM_ASCEND_ENABLE_NZ": "0"}, "VLLM_ASCEND_ENABLE_NZ", "ok"),
        ({"HCCL_SOCKET_IFNAME": "nowhere0"}, "network interface", "fail"),
        ({"HCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}, "network interface", "ok"),
    ],
)
def test_npu_variables(env, name, status):
    assert of(variables.of_npu(env, config()), name).status == status


def test_launch_blocking_does_not_go_with_graphs():
    graphs = config(rollout={"eager": False})
    assert of(variables.of_npu({"ASCEND_LAUNCH_BLOCKING": "1"}, graphs), "graph mode").status == "fail"
    assert of(variables.of_npu({"ASCEND_LAUNCH_BLOCKING": "1"}, config()), "graph mode").status == "ok"


def preloading(path: Path | str) -> RunConfig:
    return config(ray={"preload": {"LD_PRELOAD": str(path)}})


def test_preload_that_does_not_exist_or_is_for_another_processor_fails(tmp_path):
    assert "does not exist" in variables.preload(preloading(tmp_path / "none.so")).reason
    other = tmp_path / "other.so"
    other.write_bytes(b"\x7fELF" + bytes(14) + (8).to_bytes(2, "little"))  # 8: MIPS
    assert variables.preload(preloading(other)).reason == f"{other} is not a library for {platform.machine()}"


def test_preload_is_looked_for_in_the_running_processes():
    maps = Path("/proc/self/maps").read_text().splitlines()
    library = next(line.split()[-1] for line in maps if "/libc.so" in line or "/libc-" in line)
    assert variables.mapped(preloading(library), [os.getpid()]).status == "ok"
    missing = variables.mapped(preloading("/usr/lib/libjemalloc.so.2"), [os.getpid()])
    assert missing.status == "fail"
    assert f"process {os.getpid()} of Ray runs without /usr/lib/libjemalloc.so.2" in missing.reason


def test_cluster_without_enough_devices_names_both_numbers():
    nodes = [{"resources_total": {"CPU": 8.0, "NPU": 8.0}}]
    wanted = config(device="npu", model={"parallel": {"world_size": 16}})
    check = checks.cluster(wanted, nodes)[0]
    assert check.status == "fail"
    assert "1 node: 8 CPU, 8 NPU; model.parallel.world_size=16 and rollout.devices=0 need 16 NPU" in check.reason
    assert checks.cluster(wanted, nodes * 2)[0].status == "ok"


def test_weights_without_a_shard_of_their_index_fail(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl", "text_config": {"num_attention_heads": 4}}')
    (tmp_path / "train.parquet").touch()
    found = checks.inputs(config(), tmp_path, tmp_path)
    assert of(found, "data").reason == f"{tmp_path} has no test.parquet"
    assert of(found, "weights").reason == f"{tmp_path} lacks *.safetensors"
    (tmp_path / "model-1.safetensors").write_bytes(b"1234")
    index = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert of(checks.inputs(config(), tmp_path, tmp_path), "weights").reason.endswith("lacks model-2.safetensors")
    (tmp_path / "model-2.safetensors").write_bytes(b"1234")
    assert of(checks.inputs(config(), tmp_path, tmp_path), "weights").status == "ok"


def test_parallel_sizes_that_do_not_divide_the_heads_name_those_that_do(tmp_path):
    (tmp_path / "config.json").write_text('{"text_config": {"num_attention_heads": 32, "num_key_value_heads": 4}}')
    (tmp_path / "model.safetensors").write_bytes(b"1234")

    def heads(**parallel):
        wanted = config(
            model={"parallel": {"world_size": 24, "sequence_parallel": parallel.get("sequence", 1)}},
            rollout={"tensor_parallel": parallel.get("tensor", 1)},
        )
        return of(checks.inputs(wanted, tmp_path, tmp_path), "heads")

    assert "model.parallel.sequence_parallel=3 does not divide the 32 attention heads" in heads(sequence=3).reason
    assert heads(sequence=3).remedy in ("try 2 or 4", "try 4 or 2")
    assert heads(tensor=8).status == "warn"
    assert heads(tensor=4).status == "ok"


def test_hub_is_not_asked_where_everything_is_local():
    assert of(checks.machine(io.load("configs/geo3k_tiny.yaml")), "hub").status == "skip"


def test_hub_that_does_not_answer_is_a_warning_with_the_way_round(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    away = config(data={"source": {"kind": "hub", "endpoint": "http://127.0.0.1:9"}})
    check = of(checks.machine(away), "hub")
    assert check.status == "warn"
    assert "http://127.0.0.1:9 does not answer" in check.reason
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert of(checks.machine(away), "hub").status == "ok"


def test_cluster_elsewhere_is_not_judged_by_this_machine():
    found = checks.machine(io.load("configs/geo3k.yaml", {"ray.address": "http://head:8265"}))
    assert {c.name for c in found if c.status == "fail"} <= {"disk: runs", "disk: cache"}
    assert of(found, "device").status == "skip"
