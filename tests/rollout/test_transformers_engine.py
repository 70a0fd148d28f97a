"""The transformers engine against plain transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dapo.data.processor import PromptProcessor
from dapo.errors import EngineError, WeightsError
from dapo.rollout.transformers_engine import TransformersEngine
from dapo.types import Completion, FinishReason
from tests.rollout.small import (
    check_partial_rollouts,
    distributions,
    largest_gap,
    load_plain,
    make_prompts,
    sampling,
    shake,
)

Folders = Callable[[str], Path]
Processors = Callable[[str], PromptProcessor]


@pytest.fixture(scope="module")
def engine_of(folder_of: Folders, processor_of: Processors) -> Callable[[str], TransformersEngine]:
    made: dict[str, TransformersEngine] = {}

    def get(kind: str) -> TransformersEngine:
        if kind not in made:
            made[kind] = TransformersEngine(folder_of(kind), processor_of(kind))
        return made[kind]

    return get


Engines = Callable[[str], TransformersEngine]


def _ids(out: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[one.token_ids for one in group] for group in out]


@pytest.mark.parametrize("kind", ["dense", "moe", "text", "text_moe", "tied"])
def test_logprobs_of_sampled_tokens_equal_a_plain_forward(
    kind: str, engine_of: Engines, folder_of: Folders, processor_of: Processors
) -> None:
    processor = processor_of(kind)
    prompts, params = make_prompts(processor, 6), sampling(processor)
    out = engine_of(kind).generate(prompts, params)
    assert [len(group) for group in out] == [4] * 6
    assert len({len(one.token_ids) for group in out for one in group}) > 3  # rows were dropped on the way
    assert largest_gap(load_plain(folder_of(kind)), processor, prompts, out, params.temperature) < 1e-5


def test_greedy_equals_transformers_generate(engine_of: Engines, folder_of: Folders, processor_of: Processors) -> None:
    processor = processor_of("dense")
    model, prompt = load_plain(folder_of("dense")), make_prompts(processor, 1)[0]
    params = sampling(processor, n=1, temperature=0.0, stop_token_ids=())
    pixels, grids = processor.vision_inputs([prompt])
    ids = torch.tensor([prompt.token_ids])
    wanted = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        image_grid_thw=grids,
        mm_token_type_ids=(ids == processor.image_token_id).int(),
        do_sample=False,
        max_new_tokens=params.max_tokens,
        eos_token_id=None,
        suppress_tokens=list(processor.banned_token_ids),
    )[0, ids.shape[1] :]
    (only,) = engine_of("dense").generate([prompt], params)[0]
    assert only.token_ids == tuple(wanted.tolist())


def test_tokens_do_not_depend_on_the_batch_they_are_in(engine_of: Engines, processor_of: Processors) -> None:
    processor, engine = processor_of("dense"), engine_of("dense")
    prompts, params = make_prompts(processor, 6), sampling(processor)
    together = engine.generate(prompts, params)
    reversed_order = engine.generate(prompts[::-1], params)[::-1]
    assert _ids(reversed_order) == _ids(together)
    for prompt, group in zip(prompts, together, strict=True):
        (alone,) = engine.generate([prompt], replace(params, n=2))
        assert _ids([alone]) == _ids([group[:2]])
        for one, same in zip(alone, group[:2], strict=True):
            assert one.logprobs == pytest.approx(same.logprobs, abs=1e-5)


def test_small_waves_give_the_same_tokens(engine_of: Engines, processor_of: Processors, folder_of: Folders) -> None:
    processor = processor_of("dense")
    prompts, params = make_prompts(processor, 5), sampling(processor)
    narrow = TransformersEngine(folder_of("dense"), processor, max_num_seqs=4)
    assert _ids(narrow.generate(prompts, params)) == _ids(engine_of("dense").generate(prompts, params))


@pytest.mark.parametrize("kind", ["dense", "text_moe"])
def test_a_response_written_in_rounds_is_the_response_of_one_round(
    kind: str, engine_of: Engines, folder_of: Folders, processor_of: Processors
) -> None:
    check_partial_rollouts(engine_of(kind), load_plain(folder_of(kind)), processor_of(kind), exact=1e-5)


def test_samples_seeds_and_prompts_have_their_own_streams(engine_of: Engines, processor_of: Processors) -> None:
    processor, engine = processor_of("text"), engine_of("text")
    prompt = make_prompts(processor, 1)[0]
    params = sampling(processor, n=3, stop_token_ids=())
    first = [one.token_ids for one in engine.generate([prompt], params)[0]]
    assert len(set(first)) == 3
    assert first == [one.token_ids for one in engine.generate([prompt], params)[0]]
    other_seed = [one.token_ids for one in engine.generate([prompt], replace(params, seed=8))[0]]
    other_id = [one.token_ids for one in engine.generate([replace(prompt, id="train/99")], params)[0]]
    assert not set(first) & set(other_seed)
    assert not set(first) & set(other_id)


def test_sampled_frequencies_follow_the_distribution(
    engine_of: Engines, folder_of: Folders, processor_of: Processors
) -> None:
    processor = processor_of("text")
    prompt = make_prompts(processor, 1)[0]
    params = sampling(processor, n=4096, max_tokens=1)
    drawn = torch.tensor([one.token_ids[0] for one in engine_of("text").generate([prompt], params)[0]])
    logits = distributions(load_plain(folder_of("text")), processor, prompt, [0])[0] / params.temperature
    expected = torch.softmax(logits, -1) * len(drawn)
    counts = torch.bincount(drawn, minlength=len(expected)).float()
    assert (counts[expected == 0] == 0).all()  # banned ids
    often = expected >= 5
    chi_squared = ((counts - expected)[often] ** 2 / expected[often]).sum()
    degrees = int(often.sum())
    assert chi_squared < degrees + 5 * (2 * degrees) ** 0.5


def test_truncation_is_distinguished_from_stopping(engine_of: Engines, processor_of: Processors) -> None:
    processor, engine = processor_of("dense"), engine_of("dense")
    prompts = make_prompts(processor, 4)
    params = sampling(processor, max_tokens=6)
    out = [one for group in engine.generate(prompts, params) for one in group]
    stopped = [one for one in out if one.finish_reason is FinishReason.STOP]
    cut = [one for one in out if one.finish_reason is FinishReason.LENGTH]
    assert stopped
    assert cut
    for one in stopped:
        assert one.token_ids[-1] in params.stop_token_ids
        assert not set(one.token_ids[:-1]) & set(params.stop_token_ids)
    for one in cut:
        assert len(one.token_ids) == 6
        assert not set(one.token_ids) & set(params.stop_token_ids)


def test_longer_limit_only_prolongs_what_was_cut(engine_of: Engines, processor_of: Processors) -> None:
    processor, engine = processor_of("dense"), engine_of("dense")
    prompts = make_prompts(processor, 3)
    short = engine.generate(prompts, sampling(processor, max_tokens=5))
    long = engine.generate(prompts, sampling(processor, max_tokens=80))
    for a, b in zip((c for g in short for c in g), (c for g in long for c in g), strict=True):
        assert b.token_ids[: len(a.token_ids)] == a.token_ids


def test_update_weights_changes_answers_and_version(
    engine_of: Engines, folder_of: Folders, processor_of: Processors
) -> None:
    processor = processor_of("moe")
    prompts, params = make_prompts(processor, 3), sampling(processor)
    engine = TransformersEngine(folder_of("moe"), processor)
    before = engine.generate(prompts, params)
    trainer = load_plain(folder_of("moe"))
    shake(trainer, 0.05, seed=1)
    engine.update_weights(trainer.state_dict().items(), version=3)
    after = engine.generate(prompts, params)
    assert before[0][0].token_ids != after[0][0].token_ids
    assert (before[0][0].policy_version, after[0][0].policy_version) == (0, 3)
    assert largest_gap(trainer, processor, prompts, after, params.temperature) < 1e-5
    wanted = {name: float(t.double().abs().sum()) for name, t in trainer.state_dict().items()}
    assert engine.fingerprint() == pytest.approx(wanted, rel=1e-12)


def test_tied_head_may_be_sent_once(folder_of: Folders, processor_of: Processors) -> None:
    engine = TransformersEngine(folder_of("tied"), processor_of("tied"))
    trainer = load_plain(folder_of("tied"))
    shake(trainer, 0.05, seed=1)
    engine.update_weights(trainer.named_parameters(), version=1)  # names a shared tensor once
    prompts, params = make_prompts(processor_of("tied"), 2), sampling(processor_of("tied"))
    assert largest_gap(trainer, processor_of("tied"), prompts, engine.generate(prompts, params), 0.8) < 1e-5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: {k: v for k, v in s.items() if "layers.1.mlp.down" not in k},
            r"1 tensors did not arrive.*layers\.1",
        ),
        (lambda s: s | {"model.extra.weight": torch.zeros(2)}, r"model\.extra\.weight.*no such tensor"),
        (lambda s: {k: v.T if k.endswith("lm_head.weight") else v for k, v in s.items()}, r"lm_head\.weight of shape"),
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_sync_of_wrong_tensors_names_the_first(
    damage: Callable, message: str, folder_of: Folders, processor_of: Processors
) -> None:
    engine = TransformersEngine(folder_of("dense"), processor_of("dense"))
    state = load_plain(folder_of("dense")).state_dict()
    with pytest.raises(EngineError, match=message):
        engine.update_weights(damage(state).items(), version=1)


def test_only_what_an_engine_was_given_can_be_kept(folder_of: Folders, processor_of: Processors) -> None:
    engine = TransformersEngine(folder_of("dense"), processor_of("dense"))
    with pytest.raises(EngineError, match=r"lm_head\.weight was not sent, and this engine has never been given it"):
        engine.update_weights([], version=1, unchanged=["lm_head.weight"])


def test_nan_weights_are_garbage_and_good_weights_heal(folder_of: Folders, processor_of: Processors) -> None:
    processor = processor_of("dense")
    engine = TransformersEngine(folder_of("dense"), processor)
    prompts, params = make_prompts(processor, 2), sampling(processor)
    good = load_plain(folder_of("dense"))
    poisoned = {name: torch.full_like(t, torch.nan) for name, t in good.state_dict().items()}
    engine.update_weights(poisoned.items(), version=1)
    with pytest.raises(EngineError, match="log-probability nan"):
        engine.generate(prompts, params)
    engine.update_weights(good.state_dict().items(), version=2)
    assert largest_gap(good, processor, prompts, engine.generate(prompts, params), 0.8) < 1e-5


def test_responses_stream_out_before_the_longest_has_ended(engine_of: Engines, processor_of: Processors) -> None:
    processor = processor_of("dense")
    prompts = make_prompts(processor, 16)
    params = sampling(processor, n=8, max_tokens=64)
    lengths = [len(done.completion.token_ids) for done in engine_of("dense").stream(prompts, params)]
    assert len(lengths) == 128
    assert max(lengths[:40]) < max(lengths)


def test_bfloat16_stays_near_the_plain_forward(folder_of: Folders, processor_of: Processors) -> None:
    processor = processor_of("dense")
    prompts, params = make_prompts(processor, 4), sampling(processor)
    engine = TransformersEngine(folder_of("dense"), processor, dtype=torch.bfloat16)
    out = engine.generate(prompts, params)
    plain = load_plain(folder_of("dense")).to(torch.bfloat16)
    assert largest_gap(plain, processor, prompts, out, params.temperature) < 0.2


def test_no_prompts_give_no_answers(engine_of: Engines, processor_of: Processors) -> None:
    assert engine_of("text").generate([], sampling(processor_of("text"))) == []


def test_a_model_of_another_family_is_refused(tmp_path: Path, processor_of: Processors) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="not a Qwen3 text model"):
        TransformersEngine(tmp_path, processor_of("text"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path, processor_of: Processors) -> None:
    with pytest.raises(WeightsError, match="cannot load a model"):
        TransformersEngine(tmp_path, processor_of("text"))
