"""A pack through the network against plain transformers, each response as a sequence of its own."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from dapo.model import attention_split
from dapo.model.linear import ROWS
from dapo.model.load import load_model
from dapo.model.network import Network
from dapo.plan.packing import plan_packs
from dapo.train.collate import Collator
from tests.model.tiny import BANNED, IMAGE, VOCABULARY, TinyProcessor, exact_float64, make_batch, make_folder

CPU = torch.device("cpu")
TEMPERATURE = 0.9


def banned_mask():
    mask = torch.zeros(VOCABULARY, dtype=torch.bool)
    mask[list(BANNED)] = True
    return mask


def plain_model(folder, kind, dtype):
    auto = AutoModelForCausalLM if kind.startswith("text") else AutoModelForImageTextToText
    model = auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    if kind.endswith("moe"):
        model.set_experts_implementation("eager")
    return model


def plain_logprobs(model, processor, prompt, response):
    """By transformers' own forward: expanded prompt and response in one row."""
    ids = torch.tensor([[*prompt.token_ids, *response]])
    extra = {}
    if prompt.image_grids:
        pixels, grids = processor.vision_inputs([prompt])
        kinds = torch.zeros_like(ids)
        kinds[0, : len(prompt.token_ids)] = torch.tensor(prompt.token_ids) == IMAGE
        extra = {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": kinds.int()}
    logits = model(input_ids=ids, **extra).logits[0, len(prompt.token_ids) - 1 : -1] / TEMPERATURE
    logprobs = logits.masked_fill(banned_mask(), float("-inf")).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("kernel", ["short", "split"])
@pytest.mark.parametrize("kind", ["dense", "moe", "text", "text-moe"])
def test_shared_prefix_gradients_equal_separate_sequences(kind, kernel, tmp_path, monkeypatch):
    if kernel == "split":
        monkeypatch.setattr(attention_split, "MAX_CONTEXT", 0)
    folder = make_folder(tmp_path, kind)
    dtype = torch.float64
    model, plain = load_model(folder, device=CPU, dtype=dtype), plain_model(folder, kind, dtype)
    processor = TinyProcessor(kind, dtype)
    network = Network(model, TEMPERATURE, banned_mask())
    batch = make_batch(groups=3, per_update=3, images="none" if kind.startswith("text") else "some")
    (packs,) = plan_packs(batch, ranks=1, tokens_per_pack=80).updates[0]
    collate = Collator(processor, network, CPU, dtype)
    with exact_float64():
        for pack in packs:
            inputs, targets = collate(batch, pack)
            logprobs, _ = network(inputs)
            pull = torch.linspace(-1, 1, len(logprobs), dtype=dtype)
            (logprobs * pull).sum().backward()
            separate = torch.cat(
                [
                    plain_logprobs(plain, processor, batch.groups[g].prompt, batch.groups[g].sequences[s].response_ids)
                    for g, s in targets.sequences
                ]
            )
            (separate * pull).sum().backward()
            torch.testing.assert_close(logprobs, separate, rtol=0, atol=1e-11)
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("kind", ["dense", "moe", "text", "text-moe"])
def test_float32_packs_with_rounded_rows_equal_separate_sequences(kind, tmp_path):
    """Float32 goes through oneDNN with row counts rounded up; float64 above does not."""
    folder = make_folder(tmp_path, kind)
    network = Network(load_model(folder, device=CPU), TEMPERATURE, banned_mask())
    processor, plain = TinyProcessor(kind), plain_model(folder, kind, torch.float32)
    batch = make_batch(groups=3, per_update=3, images="none" if kind.startswith("text") else "all")
    (pack,) = plan_packs(batch, ranks=1, tokens_per_pack=500).updates[0][0]
    inputs, targets = Collator(processor, network, CPU, torch.float32)(batch, pack)
    assert len(inputs.token_ids) % ROWS == 0 or not torch.backends.mkldnn.is_available()
    logprobs, _ = network(inputs)
    separate = torch.cat(
        [
            plain_logprobs(plain, processor, batch.groups[g].prompt, batch.groups[g].sequences[s].response_ids)
            for g, s in targets.sequences
        ]
    )
    torch.testing.assert_close(logprobs, separate, rtol=0, atol=1e-5)
    pull = torch.linspace(-1, 1, len(logprobs))
    (logprobs * pull).sum().backward()
    (separate * pull).sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in network.model.named_parameters():
        scale = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=2e-5 * scale, msg=name)


def test_a_placeholder_inside_a_response_is_read_as_text(tmp_path):
    folder = make_folder(tmp_path, "dense")
    network = Network(load_model(folder, device=CPU), 1.0, None)
    batch = make_batch(groups=1, size=2, per_update=1)
    group = batch.groups[0]
    odd = type(group.sequences[0])((5, IMAGE, 7), 1.0, (-1.0,) * 3)
    batch = type(batch)((type(group)(group.prompt, (group.sequences[0], odd)),), ((0,),), 0)
    (pack,) = plan_packs(batch, ranks=1, tokens_per_pack=80).updates[0][0]
    logprobs, _ = network(Collator(TinyProcessor(), network, CPU, torch.float32)(batch, pack)[0])
    assert bool(torch.isfinite(logprobs).all())
    features = sum(h * w // 4 for _, h, w in group.prompt.image_grids)
    inputs, _ = Collator(TinyProcessor(), network, CPU, torch.float32)(batch, pack)
    assert len(inputs.image_index) == features


def test_a_blank_image_changes_nothing(tmp_path):
    """What sharded ranks add to packs without images, so that all of them run the vision tower."""
    network = Network(load_model(make_folder(tmp_path, "dense"), device=CPU), 1.0, None)
    batch = make_batch(groups=2, images="none")
    (pack,) = plan_packs(batch, ranks=1, tokens_per_pack=200).updates[0][0]
    results = []
    for always in (False, True):
        collate = Collator(TinyProcessor(), network, CPU, torch.float32)
        collate.always_see = always
        network.zero_grad()
        logprobs, _ = network(collate(batch, pack)[0])
        logprobs.sum().backward()
        results.append((logprobs.detach(), {n: p.grad for n, p in network.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        blank = results[1][1][name]
        assert torch.equal(blank, torch.zeros_like(blank) if grad is None else grad), name


class Waits(TorchDispatchMode):
    """Notes operators for which the host must wait for a device: sizes or numbers that only the device knows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or name in ("nonzero", "_local_scalar_dense", "masked_select", "unique"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_no_layer_makes_the_host_wait(tmp_path):
    """Forward, recomputation and backward of a pack with images."""
    folder = make_folder(tmp_path, "dense")
    model = load_model(folder, device=CPU, dtype=torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    network = Network(model, TEMPERATURE, banned_mask())
    batch = make_batch(groups=2, per_update=2, images="some")
    (packs,) = plan_packs(batch, ranks=1, tokens_per_pack=80).updates[0]
    pack, _ = Collator(TinyProcessor(), network, CPU, torch.float32)(batch, packs[0])
    assert len(pack.image_index)
    network(pack)  # lays its pieces out, once per pack
    with Waits() as waits:
        logprobs, entropy = network(pack)
        (logprobs.sum() + entropy.sum()).backward()
    assert waits.seen == []
