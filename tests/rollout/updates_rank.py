"""One of two ranks that train and generate, as a run's workers do; writes one line of JSON.

python -m tests.rollout.updates_rank FOLDER RANK PORT ENGINE TENSOR_PARALLEL UPDATES
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any

WORLD = 2


def main(folder: str, rank: str, port: str, engine: str, tensor_parallel: str, updates: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from dapo.config import io
    from dapo.plan.packing import plan_packs
    from dapo.runtime.actors import Trainer
    from dapo.types import TrainBatch, TrainGroup, TrainSequence
    from tests.rollout.small import make_prompts, sampling

    ranks = int(tensor_parallel)
    config = io.validate(
        {
            "device": "cpu",
            "model": {
                "compute_dtype": "float32",
                "parallel": {"world_size": WORLD},
                "optimizer": {"lr": 3e-3, "warmup_updates": 0},
            },
            "rollout": {
                "engine": engine,
                "temperature": 0.8,
                "tensor_parallel": ranks,
                "kv_cache_mib": 32,
                "max_num_seqs": 32,
            },
            "data": {"max_prompt_tokens": 128},
            "batch": {"max_response_tokens": 24, "tokens_per_pack": 512},
        }
    )
    worker = Trainer(config, int(rank), WORLD)
    worker.start(f"127.0.0.1:{port}", folder)
    prompts = make_prompts(worker.processor, 4)
    replicas = WORLD // ranks
    gaps: list[float] = []
    first: Any = None
    for version in range(int(updates) + 1):
        worker.sync(version)
        params = replace(sampling(worker.processor, n=2), seed=version)
        own = worker.engine.generate(prompts[int(rank) // ranks :: replicas], params)
        parts: list[Any] = [None] * WORLD
        torch.distributed.all_gather_object(parts, own)
        completions = [parts[ranks * (i % replicas)][i // replicas] for i in range(len(prompts))]
        groups = tuple(
            TrainGroup(p, tuple(TrainSequence(c.token_ids, 1.0 - 2 * i, c.logprobs) for i, c in enumerate(group)))
            for p, group in zip(prompts, completions, strict=True)
        )
        batch = TrainBatch(groups, (tuple(range(len(groups))),), policy_version=version)
        plan = plan_packs(batch, ranks=WORLD, tokens_per_pack=512)
        gaps.append(_gap(batch, worker.logprobs(batch, plan)))
        first = first or (batch, plan)
        worker.old_logprobs(batch, plan)
        assert worker.update(batch, plan, 0).metrics["grad_norm"] > 0
    moved = _gap(first[0], worker.logprobs(*first))
    sys.stdout.write("RESULT " + json.dumps({"gaps": gaps, "moved": moved}) + "\n")
    worker.engine.close()
    worker.policy.close()


def _gap(batch: Any, trainer: Any) -> float:
    """Largest |engine - trainer| of the sequences this rank computed, nats."""
    return max(
        abs(a - b)
        for group, computed in zip(batch.groups, trainer.values, strict=True)
        for sequence, values in zip(group.sequences, computed, strict=True)
        if values
        for a, b in zip(sequence.rollout_logprobs, values, strict=True)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
