"""Topic 09: the reference's logged numbers, from the functions ours are made of."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest

from dapo.eval.estimate import Reducer, bootstrap_mean, majority, over_prompts, powers_of_two_to, resample_rows
from dapo.observe.metrics import describe, response_metrics, speed_metrics, update_metrics
from dapo.plan.flops import ModelFlops
from tests.parity.cases import METRIC_TOLERANCE, TOLERANCES, Case, assert_matches
from tests.records import group, prompt

DOUBLE = TOLERANCES["float64"]


@pytest.mark.golden("09_train_metrics")
def test_step_statistics_agree(case: Case) -> None:
    if "error" in case.out:
        # A batch without a token: the older release raises. Ours says NaN, like the newer one, and rings an alarm.
        assert all(math.isnan(value) for value in describe([]).values())
        return
    assert_matches(_train_metrics(case), case.out, max(case.tolerance(), METRIC_TOLERANCE))


def _train_metrics(case: Case) -> dict[str, float]:
    given = case.inputs
    written, asked = given["response_lengths"], given["prompt_lengths"]
    mask = case.tensor("response_mask").bool()
    has_tokens = mask.any(1)
    logged: dict[str, float] = {}
    for name, key in (("score", "token_level_scores"), ("rewards", "token_level_rewards")):
        sequences = case.tensor(key).double().sum(1)[has_tokens]
        logged |= {f"critic/{name}/{k}": v for k, v in describe(sequences.tolist()).items()}
    for key in ("advantages", "returns"):
        logged |= {f"critic/{key}/{k}": v for k, v in describe(case.tensor(key)[mask].tolist()).items()}

    width = given["response_width"]
    groups = [
        group(str(i), [True], lengths=[n], cut=[0] if n == width else [], asked=prompt(str(i), tokens))
        for i, (n, tokens) in enumerate(zip(written, asked, strict=True))
    ]
    with_tokens = [g for g, n in zip(groups, written, strict=True) if n]
    for prefix, members in (("response_length", groups), ("response_length_non_aborted", with_tokens)):
        ours = response_metrics(members)
        logged |= {f"{prefix}/{k}": ours[f"response/length_{k}"] for k in ("mean", "max", "min")}
        logged[f"{prefix}/clip_ratio"] = ours["response/truncated"] if members else math.nan
    logged["response/aborted_ratio"] = 1 - len(with_tokens) / len(groups)
    logged |= {f"prompt_length/{k}": v for k, v in describe(asked).items()}
    logged["prompt_length/clip_ratio"] = describe([float(n == given["prompt_width"]) for n in asked])["mean"]

    timing = given["timing_raw"]
    logged |= {f"timing_s/{name}": seconds for name, seconds in timing.items()}
    ours = speed_metrics(groups, {**timing, "generate": timing["gen"]}, given["n_gpus"])
    for name in ("update_actor", "adv", "ref", "gen", "values"):
        if name in timing:
            phase = "generate" if name == "gen" else name
            logged[f"timing_per_token_ms/{name}"] = ours[f"time/ms_per_token/{phase}"]
    logged["perf/total_num_tokens"] = sum(written) + sum(asked)
    logged["perf/time_per_step"] = timing["step"]
    logged["perf/throughput"] = ours["time/tokens_per_device_s"]
    return logged


@pytest.mark.golden("09_val_metrics")
def test_validation_estimates_agree(case: Case) -> None:
    found = _val_metrics(case.inputs)
    for key, expected in case.out["by_source_variable"].items():
        values = {name: value for name, value in expected.items() if name != "is_core"}
        assert found[key].keys() == values.keys()
        assert_matches(found[key], values, DOUBLE, key)
    for name, value in case.out["logged"].items():
        _, source, variable, metric = name.split("/", 3)
        assert_matches(found[f"{source}|{variable}"][metric], value, DOUBLE, name)


def _val_metrics(given: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    rows = defaultdict(list)
    for row, key in enumerate(zip(given["data_source"], given["uid"], strict=True)):
        rows[key].append(row)
    estimates = defaultdict(list)
    for (source, _), members in rows.items():
        votes = [given["infos"]["pred"][i] for i in members] if "pred" in given["infos"] else None
        for variable, values in given["infos"].items():
            if isinstance(values[0], str):
                continue
            estimates[f"{source}|{variable}"].append(
                _of_prompt(
                    [values[i] for i in members],
                    votes,
                    resamples=given["n_bootstrap"],
                    seed=given["bootstrap_seed"],
                )
            )
    return {key: over_prompts(values) for key, values in estimates.items()}


def _of_prompt(values: Sequence[float], votes: Sequence[str] | None, *, resamples: int, seed: int) -> dict[str, float]:
    """The reference's names for one prompt's samples; ours has pass@k, without resampling, for best@k."""
    n = len(values)
    estimates = {f"mean@{n}": describe(values)["mean"]}
    if n == 1:
        return estimates
    estimates[f"std@{n}"] = float(np.std(values))
    reducers: dict[str, Reducer] = {
        "best": lambda row: max(values[i] for i in row),
        "worst": lambda row: min(values[i] for i in row),
    }
    if votes is not None:
        reducers["maj"] = lambda row: values[majority(votes, row)]
    for k in powers_of_two_to(n):
        rows = resample_rows(n, k, resamples, seed)
        for name, reduce in reducers.items():
            estimates[f"{name}@{k}/mean"] = bootstrap_mean(n, k, reduce, resamples=resamples)
            estimates[f"{name}@{k}/std"] = float(np.std([reduce(row) for row in rows]))
    return estimates


@pytest.mark.golden("09_bootstrap")
def test_bootstrap_agrees(case: Case) -> None:
    data, subset = case.inputs["data"], case.inputs["subset_size"]
    resamples, seed = case.inputs["n_bootstrap"], case.inputs["seed"]
    reducers: dict[str, Reducer] = {
        "max": lambda row: max(data[i] for i in row),
        "min": lambda row: min(data[i] for i in row),
        "mean": lambda row: sum(data[i] for i in row) / len(row),
    }
    rows = resample_rows(len(data), subset, resamples, seed)
    found: dict[str, Any] = {"first_three_index_rows": rows[:3]}
    for name, reduce in reducers.items():
        values = [reduce(row) for row in rows]
        found[f"{name}_mean_std"] = [float(np.mean(values)), float(np.std(values))]
        if seed == 42:  # the one in use
            assert bootstrap_mean(len(data), subset, reduce, resamples=resamples) == pytest.approx(np.mean(values))
    assert_matches(found, case.out, DOUBLE)


@pytest.mark.golden("09_metric_reduction")
def test_reductions_agree(case: Case) -> None:
    if "lists" in case.inputs:
        found = {
            name: describe(values)["max" if "max" in name else "min" if "min" in name else "mean"]
            for name, values in case.inputs["lists"].items()
        }
        assert_matches(found, case.out, DOUBLE)
        return
    by_update = case.inputs["values"]  # [update][rank][micro-batch]
    if case.release == "0.9.1":
        # Each update by itself, a sum over micro-batches averaged over ranks; then the updates of a step as one.
        reduced = []
        for ranks in by_update:
            sums = [math.fsum(micro_batches) for micro_batches in ranks]
            reduced.append(describe(list(chain.from_iterable(ranks))) | {"sum": describe(sums)["mean"]})
        found = {name.removeprefix("train/"): value for name, value in update_metrics(reduced).items()}
    else:
        pooled = [value for ranks in by_update for micro_batches in ranks for value in micro_batches]
        found = describe(pooled) | {"sum": math.fsum(pooled)}
    assert_matches(found, case.out, DOUBLE)


@pytest.mark.golden("09_flops_mfu")
def test_flops_agree(case: Case) -> None:
    given = case.inputs
    flops = ModelFlops.of(given["model_type"], given["config"], given["vision_config"])
    rate = 0.0
    if flops is not None:
        rate = flops.training(given["seqlens"], given["images_seqlens"] or ()) / given["delta_time_s"] / 1e12
    assert_matches({"estimated_tflops_per_s": rate}, case.out, DOUBLE)
