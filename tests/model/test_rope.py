"""mRoPE positions: by hand, and equal to transformers' own."""

import pytest
import torch
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from dapo.errors import DataError
from dapo.model.rope import image_token_index, mrope_positions

IMAGE = 99


def prompt(*parts):
    """Token ids from parts: an int is that many text tokens, a grid is an image between two marker tokens."""
    ids, grids = [], []
    for part in parts:
        if isinstance(part, int):
            ids += [1 + i % 50 for i in range(part)]
        else:
            t, h, w = part
            ids += [97] + [IMAGE] * (t * h * w // 4) + [98]
            grids.append(part)
    return ids, grids


def test_text_counts_on_by_one_on_all_axes():
    assert mrope_positions([5, 6, 7], [], image_token_id=None).tolist() == [[0, 1, 2]] * 3


def test_text_after_an_image_goes_on_after_its_longer_side():
    ids, grids = prompt(2, (1, 4, 6), 1)
    assert mrope_positions(ids, grids, image_token_id=IMAGE).tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]


@pytest.mark.parametrize(
    "parts",
    [(3, (1, 4, 4), 5), ((1, 2, 8), 3), (1, (1, 6, 2), 1, (1, 4, 8), 4), ((1, 2, 2), (1, 2, 4), (1, 8, 8), 9), (7,)],
)
def test_positions_equal_those_of_transformers(parts):
    ids, grids = prompt(*parts)
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16, "deepstack_visual_indexes": [0]}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    with torch.device("meta"):
        model = Qwen3VLModel(Qwen3VLConfig(vision_config=vision, text_config=text | {"intermediate_size": 16}))
    tensor = torch.tensor([ids])
    kinds = (tensor == IMAGE).int()
    expected, _ = model.get_rope_index(tensor, kinds, torch.tensor(grids) if grids else None)
    assert torch.equal(mrope_positions(ids, grids, image_token_id=IMAGE), expected[:, 0])


def test_a_placeholder_sampled_after_the_prompt_is_text():
    ids, grids = prompt((1, 2, 2), 2)
    positions = mrope_positions([*ids, IMAGE, 7], grids, image_token_id=IMAGE)
    assert positions[:, -2:].tolist() == [[5, 6]] * 3
    assert image_token_index([*ids, IMAGE], grids, image_token_id=IMAGE).tolist() == [1]


def test_a_prompt_cut_inside_its_image_is_refused():
    ids, grids = prompt(2, (1, 4, 4), 1)
    with pytest.raises(DataError, match=r"need 4 placeholder tokens.*has 2"):
        mrope_positions(ids[:5], grids, image_token_id=IMAGE)


def test_an_image_broken_into_two_runs_is_refused():
    with pytest.raises(DataError, match="in one run"):
        mrope_positions([IMAGE, 5, IMAGE, IMAGE, IMAGE], [(1, 4, 4)], image_token_id=IMAGE)
