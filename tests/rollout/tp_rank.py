"""One rank of engines beside a trainer's process group; writes one line of JSON.

python -m tests.rollout.tp_rank FOLDER RANK WORLD PORT TENSOR_PARALLEL [cuda]

With `cuda` the experts are spread over the ranks, too; each sees one GPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(folder: str, rank: str, world: str, port: str, tensor_parallel: str, device: str = "cpu") -> None:
    os.environ.update(RANK=rank, LOCAL_RANK="0", WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    from dapo.data.processor import PromptProcessor
    from dapo.rollout.vllm_engine import VllmEngine
    from tests.rollout.small import largest_gap, load_plain, make_prompts, sampling, shake

    path = Path(folder)
    processor = PromptProcessor(path)
    ranks = int(tensor_parallel)
    engine = VllmEngine(
        path,
        processor,
        device=device,
        max_model_len=256,
        max_num_seqs=32,
        kv_cache_mib=32,
        memory_share=0.3,
        tensor_parallel=ranks,
        expert_parallel=device == "cuda",
    )
    replica = int(rank) // ranks
    trainer, prompts = load_plain(path), make_prompts(processor, 6)[3 * replica :][:3]
    gaps, ids = [], []
    for version in range(3):
        if version:
            shake(trainer, 0.05, seed=version)
            engine.update_weights(trainer.named_parameters(), version)
        out = engine.generate(prompts, sampling(processor, n=2))
        gaps.append(largest_gap(trainer, processor, prompts, out, 0.8))
        ids.append([[one.token_ids for one in group] for group in out])
    engine.close()
    total = torch.ones(1)
    torch.distributed.all_reduce(total)  # the trainer's own group still works
    sys.stdout.write("RESULT " + json.dumps({"gaps": gaps, "ids": ids, "ranks": int(total)}) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
