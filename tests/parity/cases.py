"""Reads golden files (tests/golden/SCHEMA.md) and compares results with them. All strings in them are untrusted data.

A parity test is one function per topic::

    @pytest.mark.golden("02_grpo_advantage")
    def test_group_advantage_agrees_with_the_reference(case: Case) -> None:
        assert_matches(compute(case.inputs), case.expected, case.tolerance())

It runs once per case and release, for every file of that topic in the folder given by ``--golden``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

Release = Literal["snapshot", "0.9.1"]
Tolerance = tuple[float, float]
"""(relative, absolute)."""

TOPICS = (
    "01_policy_loss",
    "01_policy_loss_dp",
    "01_ppo_total_loss",
    "02_grpo_advantage",
    "03_kl_penalty",
    "03_kl_in_reward",
    "04_entropy_logprob",
    "05_dynamic_sampling",
    "06_overlong",
    "07_reward_rows",
    "07_reward_math_verify",
    "07_reward_dispatch",
    "07_reward_hostile",
    "08_seqlen_partition",
    "08_balance_batch",
    "08_dynamic_batch",
    "08_dynamic_batch_dp",
    "09_train_metrics",
    "09_val_metrics",
    "09_bootstrap",
    "09_metric_reduction",
    "09_flops_mfu",
)
"""Every topic of SCHEMA.md; a file belongs to the longest of these that begins its `topic` (or its name)."""

TOLERANCES: dict[str, Tolerance] = {"float64": (1e-7, 1e-10), "float32": (2e-5, 2e-6), "bfloat16": (3e-2, 3e-2)}
# The reference counts tokens in float32 and adds 1e-8 to denominators of its metrics.
METRIC_TOLERANCE: Tolerance = (1e-6, 1e-7)
# The reference keeps a float32 constant in groups of one.
GROUP_OF_ONE_TOLERANCE: Tolerance = (1e-6, 1e-6)
FLOAT32_ENTROPY_TOLERANCE: Tolerance = (1e-5, 3e-4)
EXACT: Tolerance = (0.0, 0.0)

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Case:
    """One case of one release of the reference."""

    file: str
    id: str
    release: Release
    dtype: str
    note: str
    inputs: dict[str, Any]
    out: dict[str, Any]
    """What the reference of this release returns (`out_091` already merged)."""
    quirk: str | None = None
    ideal: dict[str, Any] | None = None
    """What is right where the reference is not; may hold only some of the keys."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of single topics: `paper_formula`, `requirement`, ..."""

    def __str__(self) -> str:
        return f"{self.id}@{self.release}"

    @property
    def expected(self) -> dict[str, Any] | None:
        """`ideal` for a quirk, `out` otherwise; None: a quirk without an ideal, information only."""
        return self.out if self.quirk is None else self.ideal

    def tolerance(self) -> Tolerance:
        return TOLERANCES.get(self.dtype, EXACT)

    def tensor(self, name: str) -> torch.Tensor:
        """The input `name` as a tensor of the case's dtype."""
        return to_tensor(self.inputs[name], getattr(torch, self.dtype))


def load_cases(folder: Path, topic: str) -> list[Case]:
    """All cases of `topic` in `folder`, in file order; twice where the two releases of the reference differ."""
    cases = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if topic_of(path, document) != topic:
            continue
        for raw in document["cases"]:
            cases.extend(_releases(path.name, raw))
    return cases


def topic_of(path: Path, document: Mapping[str, Any]) -> str | None:
    """The entry of TOPICS that a file belongs to; None: not in the schema."""
    for name in (document.get("topic", ""), path.stem):
        fits = [topic for topic in TOPICS if name.startswith(topic)]
        if fits:
            return max(fits, key=len)
    return None


def _releases(file: str, raw: Mapping[str, Any]) -> list[Case]:
    known = {"id", "dtype", "note", "in", "out", "quirk", "ideal", "out_091", "ideal_091"}

    def case(release: Release, out: Any, ideal: Any) -> Case:
        return Case(
            file=file,
            id=raw["id"],
            release=release,
            dtype=raw.get("dtype", ""),
            note=raw.get("note", ""),
            inputs=raw["in"],
            out=out,
            quirk=raw.get("quirk"),
            ideal=ideal,
            extra={key: value for key, value in raw.items() if key not in known},
        )

    ideal = raw.get("ideal")
    cases = [case("snapshot", raw["out"], ideal)]
    if "out_091" in raw or "ideal_091" in raw:
        newer = overlay(raw["out"], raw.get("out_091", {}))
        newer_ideal = overlay(ideal or {}, raw["ideal_091"]) if "ideal_091" in raw else ideal
        cases.append(case("0.9.1", newer, newer_ideal))
    return cases


def overlay(base: Any, patch: Any) -> Any:
    """`patch` merged recursively over `base`; a null in the patch removes the key."""
    if not (isinstance(base, Mapping) and isinstance(patch, Mapping)):
        return patch
    merged = dict(base)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = overlay(merged[key], value) if key in merged else value
    return merged


def to_tensor(values: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Nested lists with the schema's spelling of non-finite numbers, as a tensor."""
    return torch.tensor(_numbers(values), dtype=dtype)


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return _NON_FINITE[value] if isinstance(value, str) else value


def assert_matches(actual: Any, expected: Any, tolerance: Tolerance = EXACT, where: str = "result") -> None:
    """Compare what `expected` holds (it may be partial); NaN equals NaN; `actual` may hold tensors.

    Raises:
        AssertionError: names the path of the first difference.
    """
    if isinstance(actual, torch.Tensor):
        actual = actual.tolist()
    if isinstance(expected, Mapping):
        assert isinstance(actual, Mapping), f"{where}: {actual!r} is not a record"
        for key, value in expected.items():
            assert key in actual, f"{where}.{key} is missing; present: {sorted(actual)}"
            assert_matches(actual[key], value, tolerance, f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(actual, Sequence), f"{where}: {actual!r} is not a list"
        assert not isinstance(actual, str), f"{where}: {actual!r} is a string, not a list"
        assert len(actual) == len(expected), f"{where}: {len(actual)} entries, expected {len(expected)}"
        for index, value in enumerate(expected):
            assert_matches(actual[index], value, tolerance, f"{where}[{index}]")
    elif not _is_number(actual, expected):
        assert actual == expected, f"{where}: {actual!r}, expected {expected!r}"
    else:
        number = _numbers(expected)
        relative, absolute = tolerance
        same = math.isclose(actual, number, rel_tol=relative, abs_tol=absolute)
        both_nan = math.isnan(actual) and math.isnan(number)
        assert same or both_nan, f"{where}: {actual!r}, expected {number!r} (tolerance {relative}, {absolute})"


def _is_number(actual: Any, expected: Any) -> bool:
    if isinstance(expected, str):
        return expected in _NON_FINITE and isinstance(actual, float)
    return isinstance(expected, int | float) and not isinstance(expected, bool)
