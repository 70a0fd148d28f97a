"""The tiny model: an ordinary Hugging Face folder, made whole or not at all, that learns what the teacher shows."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from dapo import torchvision_cpu
from dapo.config.model import TinyModel
from dapo.data.images import encode_png
from dapo.data.processor import PromptProcessor
from dapo.data.synthetic import FIGURES, Exercise, draw_exercises, exercises
from dapo.data.tiny import make_tiny, tiny_key
from dapo.data.warmup import _Batches

torchvision_cpu.install()
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

RAW = TinyModel(warmup_steps=0)


def silent(done: int, total: int, words: str) -> None:
    pass


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(RAW, tmp_path_factory.mktemp("tiny") / "dense", silent)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = TinyModel(warmup_steps=2, warmup_batch=8, architecture="moe")
    return make_tiny(source, tmp_path_factory.mktemp("tiny") / "moe", silent)


def test_transformers_loads_model_and_processor_like_any_other(dense: Path) -> None:
    processor = AutoProcessor.from_pretrained(dense)
    model = AutoModelForImageTextToText.from_pretrained(dense, dtype=torch.float32)
    exercise, image = next(draw_exercises("train", 0))
    content = [{"type": "image"}, {"type": "text", "text": exercise.text}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert written.shape[1] - inputs["input_ids"].shape[1] in range(1, 5)
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert 0.8e6 < model.num_parameters() < 1.2e6


def test_the_output_has_exactly_the_tokens_of_the_tokenizer(dense: Path) -> None:
    processor = PromptProcessor(dense)
    tokenizer = AutoProcessor.from_pretrained(dense).tokenizer
    assert processor.vocab_size == len(tokenizer)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.convert_ids_to_tokens(list(processor.stop_token_ids))[0] == "<|im_end|>"


def test_prompts_and_answers_fit_the_limits_of_the_default_configuration(dense: Path) -> None:
    processor = PromptProcessor(dense)
    tokenizer = AutoProcessor.from_pretrained(dense).tokenizer
    exercise, image = next(draw_exercises("train", 0))
    for exercise in (e for kind in exercises().values() for e in kind):
        assert len(processor.encode(exercise.text, [encode_png(image)]).token_ids) <= 32
        for figure in FIGURES[exercise.question]:
            assert len(tokenizer.encode(exercise.demonstration(figure))) <= 18


def test_think_tags_survive_decoding_without_control_tokens(dense: Path) -> None:
    processor = PromptProcessor(dense)
    text = Exercise("area", "ellipse", (6, 4)).demonstration()
    ids = AutoProcessor.from_pretrained(dense).tokenizer.encode(text)
    assert processor.decode([*ids, processor.stop_token_ids[0]]) == text
    assert text == "<think>\\pi/4*6*4</think>\\boxed{6\\pi}"


def test_whoever_can_read_the_configuration_can_read_the_weights(dense: Path, moe: Path) -> None:
    for folder in (dense, moe):
        assert len({(folder / name).stat().st_mode for name in ("config.json", "model.safetensors")}) == 1


def test_experts_lie_on_disk_as_on_the_hub_and_load_as_they_were(moe: Path) -> None:
    stored = load_file(moe / "model.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(moe, dtype=torch.float32)
    loaded = model.state_dict()
    name = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    hidden, width, count = 128, 96, 8
    assert stored[name].shape == (count, hidden, 2 * width)
    assert loaded[name].shape == (count, 2 * width, hidden)
    assert torch.equal(stored[name].transpose(1, 2), loaded[name])
    down = name.replace("gate_up", "down")
    assert stored[down].shape == (count, width, hidden)
    assert torch.equal(stored[down].transpose(1, 2), loaded[down])
    assert model.config.text_config.norm_topk_prob is True


def test_the_same_source_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        source = TinyModel(warmup_steps=2, warmup_batch=8, seed=seed)
        return load_file(make_tiny(source, tmp_path / name, silent) / "model.safetensors")

    torch.manual_seed(1)
    first = weights("first", 0)
    torch.manual_seed(2)
    again, other = weights("again", 0), weights("other", 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_making_it_leaves_the_threads_the_precision_and_the_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.get_num_threads(), torch.get_float32_matmul_precision()
    make_tiny(TinyModel(warmup_steps=1, warmup_batch=4), tmp_path / "model", silent)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.get_num_threads(), torch.get_float32_matmul_precision())


def test_the_key_follows_every_setting() -> None:
    keys = {tiny_key(RAW.model_copy(update=change)) for change in ({}, {"seed": 1}, {"wrong_share": 0.5})}
    assert len(keys) == 3
    assert tiny_key(RAW) == tiny_key(TinyModel(warmup_steps=0))


def test_progress_tells_every_step_and_the_loss(tmp_path: Path) -> None:
    reported: list[tuple[int, int, str]] = []
    make_tiny(TinyModel(warmup_steps=3, warmup_batch=4), tmp_path / "model", lambda *words: reported.append(words))
    assert [(done, total) for done, total, _ in reported] == [(1, 3), (2, 3), (3, 3)]
    assert all(words.startswith("loss ") for _, _, words in reported)


def test_a_model_that_is_there_is_not_made_again(dense: Path) -> None:
    before = (dense / "model.safetensors").stat().st_mtime_ns
    assert make_tiny(TinyModel(warmup_steps=5), dense, silent) == dense
    assert (dense / "model.safetensors").stat().st_mtime_ns == before


def test_a_warm_up_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int, words: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_tiny(TinyModel(warmup_steps=2, warmup_batch=4), tmp_path / "model", stop)
    assert list(tmp_path.iterdir()) == []


def test_demonstrations_side_by_side_have_the_loss_of_each_alone(dense: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(dense, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(dense)
    wrong_share = 0.6
    drawn = list(islice(draw_exercises("train", 3), 3))
    losses, weights = [], []
    for exercise, image in drawn:
        content = [{"type": "image"}, {"type": "text", "text": exercise.text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        for figure in FIGURES[exercise.question]:
            answer = exercise.demonstration(figure) + "<|im_end|>"
            inputs = processor(text=[prompt + answer], images=[image], return_tensors="pt")
            length = len(processor.tokenizer.encode(answer))
            logits = model(**inputs).logits[0, -length - 1 : -1]
            losses.append(functional.cross_entropy(logits, inputs["input_ids"][0, -length:], reduction="none"))
            # Half of 0.4 + 0.6 / 4: the teacher is right by intention or by chance.
            weight = torch.full((length,), 0.55 if figure == exercise.figure else 0.15)
            weight[1] *= 4.0
            weights.append(weight)
    weight = torch.cat(weights)
    expected = (torch.cat(losses) * weight).sum() / weight.sum()
    assert _Batches(dense, wrong_share).loss(model, drawn).item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.slow
def test_warm_up_teaches_the_form_and_leaves_the_choice_of_formula_open(tmp_path: Path) -> None:
    source = TinyModel(warmup_steps=300, wrong_share=0.7)
    folder = make_tiny(source, tmp_path / "model", silent)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    chosen, seen, form = [], [], []
    for exercise, image in islice(draw_exercises("test", 0), 64):
        content = [{"type": "image"}, {"type": "text", "text": exercise.text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        answer = exercise.demonstration() + "<|im_end|>"
        inputs = processor(text=[prompt + answer], images=[image], return_tensors="pt")
        length = len(processor.tokenizer.encode(answer))
        with torch.no_grad():
            logprobs = model(**inputs).logits[0, -length - 1 : -1].log_softmax(-1)
        targets = inputs["input_ids"][0, -length:]
        probabilities = logprobs.gather(1, targets[:, None])[:, 0].exp()
        chosen.append(probabilities[1].item())
        seen.append(logprobs[1].argmax().item() == targets[1].item())
        form.append((probabilities[0] * probabilities[2:].prod()).item())
    # The teacher takes the right formula in 0.3 + 0.7 / 4 of the demonstrations.
    assert sum(chosen) / 64 == pytest.approx(0.475, abs=0.08)
    assert sum(seen) / 64 > 0.85
    assert sum(form) / 64 > 0.9
