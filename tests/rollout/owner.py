"""Has a vLLM in a process of its own, says its number, and waits to be killed: python -m tests.rollout.owner FOLDER"""

from __future__ import annotations

import sys
import time
from pathlib import Path


def main(folder: Path) -> None:
    from dapo.config.run import RunConfig
    from dapo.data.processor import PromptProcessor
    from dapo.rollout.factory import make_engine
    from dapo.rollout.vllm_core import child_processes

    config = RunConfig.model_validate(
        {
            "data": {"max_prompt_tokens": 128},
            "batch": {"max_response_tokens": 128},
            "algorithm": {"overlong": {"buffer_tokens": 64}},
            "rollout": {"engine": "vllm", "separate_process": True, "kv_cache_mib": 32, "max_num_seqs": 32},
        }
    )
    make_engine(config, folder, PromptProcessor(folder), "cpu")
    (core,) = child_processes()
    sys.stdout.write(f"{core.pid}\n")
    sys.stdout.flush()
    time.sleep(600)


if __name__ == "__main__":  # vLLM's process imports this module again
    main(Path(sys.argv[1]))
