"""CPU speed of generation, tokens per second: `generate()`, our transformers engine and vLLM, on the same prompts.
Then whole training steps against TRL (`benchmarks.step_time`), transformers engine and vLLM.

    python -m benchmarks.generation [--architecture moe] [--prompts 64] [--samples 8] [--no-trl] [--json FILE]

The generators run in one process on one thread with the same weights, images, temperature and stop ids, and CPU seconds
are those of the whole process, so that a busy machine does not disturb the comparison. `generate()` gets one padded
batch and `num_return_sequences` (it encodes prompt and image once per sample) and returns no log-probabilities; the two
engines do. First table: all responses have full length. Second table: they end by chance, as real ones do.

The median of `--repeat` runs after one that is not counted is shown. `gap` is the largest difference of a returned
log-probability to a plain transformers forward, in nats.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from benchmarks import step_time
from dapo import torchvision_cpu
from dapo.config.model import TinyModel
from dapo.data import synthetic
from dapo.data.processor import PromptProcessor
from dapo.data.tiny import make_tiny
from dapo.types import Completion, Prompt, SamplingParams

Out = list[list[Completion]]
Run = Callable[[Sequence[Prompt], SamplingParams], tuple[int, Out | None]]
"""Returns the number of tokens sampled up to and including each stop token, and what was sampled."""


def make_prompts(processor: PromptProcessor, count: int) -> list[Prompt]:
    """Questions about figures, with the figure."""
    prompts = []
    for i, row in enumerate(synthetic.rows("train", count, seed=0)):
        out = io.BytesIO()
        row["images"][0].save(out, "PNG")
        encoded = processor.encode(row["problem"], (out.getvalue(),))
        prompts.append(Prompt(f"bench/{i}", encoded.token_ids, (out.getvalue(),), encoded.grids, row["answer"], "?"))
    return prompts


class Generate:
    """`model.generate()`."""

    def __init__(self, model: Any, processor: PromptProcessor) -> None:
        self.model, self.processor = model, processor

    def __call__(self, prompts: Sequence[Prompt], params: SamplingParams) -> tuple[int, Out | None]:
        width = max(len(p.token_ids) for p in prompts)
        ids = torch.full((len(prompts), width), self.processor.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, width - len(prompt.token_ids) :] = 1
        pixels, grids = self.processor.vision_inputs(prompts)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                pixel_values=pixels,
                image_grid_thw=grids,
                mm_token_type_ids=(ids == self.processor.image_token_id).int(),
                do_sample=True,
                temperature=params.temperature,
                top_k=0,
                num_return_sequences=params.n,
                max_new_tokens=params.max_tokens,
                eos_token_id=list(params.stop_token_ids) or None,
                pad_token_id=self.processor.pad_token_id,
                suppress_tokens=list(params.banned_token_ids),
            )[:, width:]
        stops = torch.isin(out, torch.tensor(params.stop_token_ids, dtype=torch.long))
        lengths = torch.where(stops.any(1), stops.int().argmax(1) + 1, out.shape[1])
        return int(lengths.sum()), None


class Engine:
    """One of ours behind the same call."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __call__(self, prompts: Sequence[Prompt], params: SamplingParams) -> tuple[int, Out | None]:
        out: Out = self.engine.generate(prompts, params)
        return sum(len(one.token_ids) for group in out for one in group), out


def largest_gap(
    model: Any, processor: PromptProcessor, prompts: Sequence[Prompt], out: Out, temperature: float
) -> float:
    """Of the first sample of the first prompts, against one plain forward each."""
    largest = 0.0
    for prompt, group in list(zip(prompts, out, strict=True))[:8]:
        ids = torch.tensor([[*prompt.token_ids, *group[0].token_ids]])
        pixels, grids = processor.vision_inputs([prompt])
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                image_grid_thw=grids,
                mm_token_type_ids=(ids == processor.image_token_id).int(),
                use_cache=False,
            ).logits[0, len(prompt.token_ids) - 1 : -1]
        logits[:, list(processor.banned_token_ids)] = -torch.inf
        plain = torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(group[0].token_ids)[:, None])[:, 0]
        largest = max(largest, float((plain - torch.tensor(group[0].logprobs)).abs().max()))
    return largest


def measure(run: Run, prompts: Sequence[Prompt], params: SamplingParams, repeat: int) -> tuple[int, float, Out | None]:
    """Tokens and CPU seconds of the median run, and what the last one returned."""
    run(prompts, params)
    seconds, tokens = [], 0
    out = None
    for _ in range(repeat):
        started = time.process_time()
        tokens, out = run(prompts, params)
        seconds.append(time.process_time() - started)
    return tokens, statistics.median(seconds), out


def compare(
    folder: Path, prompt_count: int, samples: int, max_tokens: int, repeat: int, with_vllm: bool
) -> list[dict[str, float | str]]:
    """One row per engine and kind of responses."""
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    processor = PromptProcessor(folder)
    prompts = make_prompts(processor, prompt_count)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    from dapo.rollout.transformers_engine import TransformersEngine

    sequences = prompt_count * samples
    runs: dict[str, Run] = {
        "generate()": Generate(model, processor),
        "transformers engine": Engine(TransformersEngine(folder, processor, max_num_seqs=sequences, kv_cache_mib=4096)),
    }
    if with_vllm:
        from dapo.rollout.vllm_engine import VllmEngine

        longest = max(len(p.token_ids) for p in prompts) + max_tokens
        vllm = VllmEngine(folder, processor, max_model_len=longest, max_num_seqs=min(sequences, 256), kv_cache_mib=512)
        runs["vLLM"] = Engine(vllm)
    letters = tuple(i for i in range(processor.vocab_size) if i not in processor.banned_token_ids)
    ends = {"full length": (), "ragged": letters[: len(letters) // 24]}
    rows: list[dict[str, float | str]] = []
    for kind, stop in ends.items():
        params = SamplingParams(samples, 1.0, 1.0, -1, max_tokens, stop, processor.banned_token_ids, seed=0)
        print(f"\n{kind}: {prompt_count} prompts with image x {samples} samples, at most {max_tokens} tokens")
        print(f"{'':14}{'tokens':>8}{'CPU s':>9}{'tokens / CPU s':>16}{'x generate()':>14}{'gap':>10}")
        base = 0.0
        for name, run in runs.items():
            tokens, seconds, out = measure(run, prompts, params, repeat)
            rate = tokens / seconds
            base = base or rate
            gap = "" if out is None else f"{largest_gap(model, processor, prompts, out, 1.0):.1e}"
            print(f"{name:14}{tokens:8d}{seconds:9.3f}{rate:16,.0f}{rate / base:14.2f}{gap:>10}", flush=True)
            rows.append({"kind": kind, "engine": name, "tokens": tokens, "cpu_s": seconds, "tokens_per_cpu_s": rate})
    for run in runs.values():
        if isinstance(run, Engine):
            run.engine.close()  # the steps against TRL need the memory
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--architecture", choices=["dense", "moe"], default="dense", help="of the random tiny model")
    parser.add_argument("--folder", type=Path, help="a Hugging Face folder instead of a random tiny model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--no-trl", action="store_true", help="leave out the whole steps against TRL")
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    args = parser.parse_args()
    torchvision_cpu.install()
    with_vllm = not args.no_vllm and importlib.util.find_spec("vllm") is not None
    architecture: Literal["dense", "moe"] = args.architecture
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder
        if folder is None:
            source = TinyModel(architecture=architecture, warmup_steps=0)
            folder = make_tiny(source, Path(made) / "model", lambda done, total, words: None)
        rows = compare(folder, args.prompts, args.samples, args.max_tokens, args.repeat, with_vllm)
    steps = [] if args.no_trl else step_time.run(["light", "vllm"] if with_vllm else ["light"], args.repeat)
    if args.json:
        args.json.write_text(json.dumps({"tokens": rows, "steps": steps}, indent=1) + "\n")


if __name__ == "__main__":
    main()
