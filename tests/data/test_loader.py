"""The loader's order is a function of seed and epoch, and two integers bring it back."""

import pytest

from dapo.data.loader import PromptLoader
from dapo.errors import DataError


def drain(loader: PromptLoader, k: int) -> list[int]:
    out: list[int] = []
    while taken := loader.take(k):
        out += taken
    return out


@pytest.mark.parametrize("k", [1, 3, 10, 64])
def test_every_prompt_is_seen_once_per_epoch_whatever_the_round_size(k: int) -> None:
    seen = drain(PromptLoader(10, seed=1, epochs=3), k)
    assert [sorted(seen[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert seen == drain(PromptLoader(10, seed=1, epochs=3), 10)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    loader = PromptLoader(50, seed=1, epochs=2)
    first, second = loader.take(50), loader.take(50)
    assert first != second
    assert PromptLoader(50, seed=2, epochs=1).take(50) != first


def test_no_round_has_a_prompt_twice() -> None:
    loader = PromptLoader(10, seed=0, epochs=5)
    while taken := loader.take(7):
        assert len(set(taken)) == len(taken)


@pytest.mark.parametrize("before", [0, 1, 9, 10, 11, 29])
def test_resumed_loader_goes_on_as_if_nothing_had_happened(before: int) -> None:
    loader = PromptLoader(10, seed=3, epochs=3)
    for _ in range(before):
        loader.take(1)
    other = PromptLoader(10, seed=3, epochs=3)
    other.load_state_dict(loader.state_dict())
    assert drain(other, 4) == drain(loader, 4)


def test_state_is_two_integers() -> None:
    loader = PromptLoader(10, seed=3, epochs=3)
    loader.take(10)
    loader.take(4)
    assert loader.state_dict() == {"epoch": 1, "position": 4}


def test_loader_is_exhausted_after_its_epochs_and_says_so() -> None:
    loader = PromptLoader(4, seed=0, epochs=2)
    assert not loader.exhausted
    assert loader.take(4)
    assert not loader.exhausted
    assert loader.take(4)
    assert loader.exhausted
    assert loader.take(4) == []
    again = PromptLoader(4, seed=0, epochs=2)
    again.load_state_dict(loader.state_dict())
    assert again.exhausted


def test_order_is_the_same_on_every_machine() -> None:
    # Written down once: another order would be another meaning of the seed in every configuration.
    assert PromptLoader(8, seed=0, epochs=1).take(8) == [0, 2, 1, 4, 6, 7, 3, 5]


def test_position_of_another_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="position 9 of epoch 0 is not in a data set of 4 prompts"):
        PromptLoader(4, seed=0, epochs=1).load_state_dict({"epoch": 0, "position": 9})


def test_empty_loader_is_refused() -> None:
    with pytest.raises(DataError, match="nothing to hand out"):
        PromptLoader(0, seed=0, epochs=1)
