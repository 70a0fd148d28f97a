"""Training work per CPU second: our update and old log-probabilities against TRL's GRPOTrainer, and against the limit.

    python -m benchmarks.train_step [--rounds 3] [--threads 1] [--json FILE]

One DAPO step of a Qwen3-VL of four million random parameters: 16 prompts with an image each, 8 responses of 4 to 48
tokens, four optimiser updates, clip 0.2 / 0.28, no KL, float32. Both train on the same responses of the same prompts
with the same weights; TRL runs in a process and a virtual environment of its own (made at the first call), and the two
take turns, step by step. CPU seconds are those of the process that works, so that a busy machine disturbs little. The
log-probabilities of the first step, before any update, are compared token by token.

"Limit": the arithmetic nobody can avoid (prompt and image once, head on response tokens only) at the rate of a float32
matrix product through oneDNN, measured in the same run. Tokens per second are of useful tokens for both: each prompt
once and each response once, although TRL computes a prompt and its image eight times.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.turns import Turns, trl_python
from dapo import torchvision_cpu
from dapo.algo.advantage import group_advantages
from dapo.config import io as config_io
from dapo.config.model import TinyModel
from dapo.data import synthetic
from dapo.data.processor import PromptProcessor
from dapo.data.tiny import make_tiny
from dapo.model.linear import product
from dapo.model.logprobs import token_logprobs
from dapo.plan.flops import ModelFlops
from dapo.plan.packing import plan_packs
from dapo.train.fsdp_policy import FsdpPolicy
from dapo.types import Prompt, TrainBatch, TrainGroup, TrainSequence

PROMPTS, GROUP, UPDATES, TOKENS_PER_PACK = 16, 8, 4, 3072


def make_model(folder: Path) -> Path:
    """The tiny model's tokenizer and processor, with a larger network of random weights and larger images."""
    torchvision_cpu.install()
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    made = make_tiny(TinyModel(warmup_steps=0), folder / "tiny", lambda *_: None)
    config = AutoConfig.from_pretrained(made)
    text = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "head_dim": 48}
    vision = {"hidden_size": 96, "intermediate_size": 256, "depth": 4, "num_heads": 4, "out_hidden_size": 192}
    for key, value in text.items():
        setattr(config.text_config, key, value)
    for key, value in vision.items():
        setattr(config.vision_config, key, value)
    config.text_config.rope_parameters |= {"mrope_section": [8, 8, 8]}
    config.vision_config.num_position_embeddings = 256
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(made)
    preprocessor = json.loads((made / "preprocessor_config.json").read_text())
    preprocessor["size"] = {"shortest_edge": 16 * 16, "longest_edge": 256 * 256}
    (made / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return made


def make_work(processor: PromptProcessor) -> tuple[TrainBatch, list[dict[str, Any]]]:
    """The step as our records, and the same as plain values for TRL."""
    rng = random.Random(0)
    allowed = sorted(set(range(processor.vocab_size)) - set(processor.banned_token_ids) - set(processor.stop_token_ids))
    groups: list[TrainGroup] = []
    rows: list[dict[str, Any]] = []
    for number, (exercise, image) in zip(range(PROMPTS), synthetic.draw_exercises("train", 0)):  # noqa: B905
        side = 16 * rng.randint(4, 7)
        out = io.BytesIO()
        image.resize((side, side)).save(out, "PNG")
        text = f"{number}. {exercise.text} The figure shows what is meant. Answer in \\boxed{{}}."
        ids, grids = processor.encode(text, [out.getvalue()])
        lengths = [max(4, min(48, round(rng.gauss(27, 12)))) for _ in range(GROUP)]
        responses = [[*rng.choices(allowed, k=n - 1), processor.stop_token_ids[0]] for n in lengths]
        rewards = [float(rng.random() < 0.5) for _ in range(GROUP)]
        advantages = group_advantages(rewards, kind="grpo")
        sequences = tuple(
            TrainSequence(tuple(r), a, (-1.0,) * len(r)) for r, a in zip(responses, advantages, strict=True)
        )
        groups.append(TrainGroup(Prompt(f"b/{number}", ids, (out.getvalue(),), grids, "1", text), sequences))
        image64 = base64.b64encode(out.getvalue()).decode()
        rows.append({"text": text, "image": image64, "prompt": ids, "responses": responses, "rewards": rewards})
    size = PROMPTS // UPDATES
    updates = tuple(tuple(range(i, i + size)) for i in range(0, PROMPTS, size))
    return TrainBatch(tuple(groups), updates, 0), rows


class Ours:
    """Our engine, one step at a time."""

    def __init__(self, folder: Path, processor: PromptProcessor, batch: TrainBatch) -> None:
        config = config_io.validate(
            {
                "device": "cpu",
                "model": {
                    "compute_dtype": "float32",
                    "gradient_checkpointing": False,
                    "optimizer": {"lr": 1e-6, "warmup_updates": 0},
                },
                # The reward's KL makes the policy compute all old log-probabilities, as TRL does; it is not applied.
                "algorithm": {"kl": {"reward_coef": 1e-9}},
                "data": {"max_prompt_tokens": 256},
                "batch": {"max_response_tokens": 48, "tokens_per_pack": TOKENS_PER_PACK},
            }
        )
        self.policy = FsdpPolicy(config, folder, processor)
        self.batch = batch
        self.plan = plan_packs(batch, ranks=1, tokens_per_pack=TOKENS_PER_PACK)

    def step(self) -> dict[str, Any]:
        """CPU and wall seconds of each phase, and the log-probabilities."""
        out: dict[str, Any] = {}
        old = timed(out, "logprob", lambda: self.policy.old_logprobs(self.batch, self.plan))
        timed(out, "update", lambda: [self.policy.update(self.batch, self.plan, u) for u in range(UPDATES)])
        return out | {"logprobs": old.values}


def timed(out: dict[str, Any], name: str, call: Callable[[], Any]) -> Any:
    """Run and note CPU and wall seconds under the name."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = call()
    out[name], out[f"{name} wall"] = time.process_time() - cpu, time.perf_counter() - wall
    return result


def float32_rate() -> float:
    """Multiply-adds a second of a large float32 product through oneDNN."""
    a, b = torch.randn(2048, 1024), torch.randn(1024, 1024)
    product(a, b)
    times = []
    for _ in range(7):
        start = time.process_time()
        for _ in range(5):
            product(a, b)
        times.append((time.process_time() - start) / 5)
    return a.numel() * b.shape[0] / statistics.median(times)


def least_work(folder: Path, batch: TrainBatch) -> float:
    """Multiply-adds of one forward pass that computes every prompt, image and response once."""
    config = json.loads((folder / "config.json").read_text())
    flops = ModelFlops.of(config["model_type"], config["text_config"], config["vision_config"])
    assert flops is not None
    total = 0.0
    for group in batch.groups:
        prompt, lengths = len(group.prompt.token_ids), [len(s.response_ids) for s in group.sequences]
        patches = [t * h * w for t, h, w in group.prompt.image_grids]
        pairs = prompt**2 / 2 + sum(n * (prompt + n / 2) for n in lengths)
        total += flops.token * (prompt + sum(lengths)) + flops.head * sum(lengths) + 2 * flops.pair * pairs
        total += flops.patch * sum(patches) + 2 * flops.patch_pair * sum(n * n for n in patches)
    return total


def head_memory() -> dict[str, float]:
    """Peak memory of a log-prob pass at Qwen3's vocabulary, beyond hidden states and weights, MiB."""
    hidden, weight = torch.randn(8192, 64), torch.randn(151_936, 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        token_logprobs(hidden, weight, torch.randint(151_936, (8192,)))
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"ours_mib": used, "full_logits_mib": 8192 * 151_936 * 4 / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each, after one that is not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    memory = head_memory()  # first: what was used before would hide it
    with tempfile.TemporaryDirectory() as work:
        folder = make_model(Path(work))
        processor = PromptProcessor(folder)
        batch, rows = make_work(processor)
        processor.banned_token_ids = ()  # TRL leaves no id out of the softmax; nor do we here
        work_file = Path(work) / "work.json"
        work_file.write_text(json.dumps(rows))
        arguments = (folder, work_file, args.rounds + 1, args.threads)
        ours = Ours(folder, processor, batch)
        trl = Turns("benchmarks.train_step_trl", arguments, python=trl_python())
        try:
            pairs = [(ours.step(), trl.step()) for _ in range(args.rounds + 1)]
        finally:
            trl.close()
        adds, rate = least_work(folder, batch), float32_rate()
    report(batch, pairs, adds, rate, memory, args)


def report(batch: TrainBatch, pairs: list[Any], adds: float, rate: float, memory: Any, args: Any) -> None:
    first_ours, first_trl = pairs[0]
    gaps = [
        abs(a - b)
        for mine, theirs in zip(first_ours["logprobs"], first_trl["logprobs"], strict=True)
        for x, y in zip(mine, theirs, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    responses = sum(len(s.response_ids) for g in batch.groups for s in g.sequences)
    useful = responses + sum(len(g.prompt.token_ids) for g in batch.groups)
    result: dict[str, Any] = {"useful_tokens": useful, "response_tokens": responses, "max_logprob_gap": max(gaps)}
    result |= {"float32_gflops": 2 * rate / 1e9, "memory": memory, "threads": args.threads, "phases": {}}
    print(f"{useful} useful tokens ({responses} of them responses); float32 product {2 * rate / 1e9:.0f} GFLOP/s")
    print(f"largest difference of log-probabilities to TRL: {max(gaps):.2g} nats\n")
    print(
        f"{'CPU s per step':<16} {'TRL':>8} {'ours':>8} {'ratio':>7} {'limit':>7} {'ours tok/s':>11} {'TRL tok/s':>10}"
    )
    for phase, passes in (("update", 3), ("logprob", 1)):
        mine = statistics.median(p[0][phase] for p in pairs[1:])
        theirs = statistics.median(p[1][phase] for p in pairs[1:])
        ratios = sorted(p[1][phase] / p[0][phase] for p in pairs[1:])
        limit = passes * adds / rate
        result["phases"][phase] = {"ours": mine, "trl": theirs, "ratios": ratios, "limit": limit}
        print(
            f"{phase:<16} {theirs:>8.2f} {mine:>8.2f} {statistics.median(ratios):>6.1f}x {limit:>7.2f} "
            f"{useful / mine:>11.0f} {useful / theirs:>10.0f}"
        )
    print(
        f"\nlog-probabilities at vocabulary 151,936 and 8,192 tokens: {memory['ours_mib']:.0f} MiB beside "
        f"{memory['full_logits_mib']:.0f} MiB that the logits alone would take"
    )
    if args.json:
        args.json.write_text(
            json.dumps(result | {"command": " ".join(["python -m benchmarks.train_step", *sys.argv[1:]])}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
