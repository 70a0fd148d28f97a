"""What of sequence parallelism can be said without ranks; with ranks it is in tests/train."""

import pytest
import torch

from dapo.errors import ConfigError
from dapo.model.layout import PackLayout
from dapo.model.network import PackInputs
from dapo.model.ulysses import SequenceGroup, check_heads, repeated_heads


def test_heads_that_cannot_be_split_are_refused_with_what_fits():
    check_heads(32, 8)
    with pytest.raises(
        ConfigError, match=r"sequence_parallel=3 must divide the model's 4 attention heads; try 1, 2, 4"
    ):
        check_heads(4, 3)


@pytest.mark.parametrize(("kv_heads", "size", "copies"), [(4, 2, 1), (4, 8, 2), (2, 4, 2), (8, 8, 1), (6, 4, 2)])
def test_key_value_heads_are_repeated_only_as_often_as_needed(kv_heads, size, copies):
    assert repeated_heads(kv_heads, size) == copies
    assert kv_heads * copies % size == 0


def test_shares_of_a_pack_hold_every_token_feature_and_target_once():
    pack = PackInputs(
        token_ids=torch.arange(10, 17),
        positions=torch.arange(7).expand(3, -1),
        layout=PackLayout((4,), ((3,),)),
        sources=torch.tensor([3, 4, 5, 6]),
        targets=torch.tensor([20, 21, 22, 23]),
        vision=None,
        image_index=torch.tensor([1, 2]),
    )
    shares = [pack.share(SequenceGroup(None, rank, 2)) for rank in range(2)]
    assert [s.token_ids.tolist() for s in shares] == [[10, 11, 12, 13], [14, 15, 16, 0]]
    assert [s.image_index.tolist() for s in shares] == [[1, 2], []]
    assert [s.targets.tolist() for s in shares] == [[20], [21, 22, 23]]
    assert [s.sources.tolist() for s in shares] == [[3], [0, 1, 2]]
    assert torch.cat([s.part.target_rows for s in shares]).tolist() == [0, 1, 2, 3]
    assert torch.cat([s.part.feature_rows for s in shares]).tolist() == [0, 1]
    assert pack.share(None) is pack
