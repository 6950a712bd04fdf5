"""Keyed draws: a function of the key alone."""

import itertools

import numpy as np
import pytest
import torch

from lightning_bd.functional.draws import keyed_generator, keyed_global_state, keyed_seed


def test_every_part_of_the_key_counts() -> None:
    keys: list[tuple[int | str, ...]] = [
        *itertools.product((0, 1), ("inject", "defend"), (0, 1), (0, 1), (0, 1)),
        (0,),
        ("0",),
        ("ab", "c"),
        ("a", "bc"),
        ("a, b",),
        ("a", "b"),
        (1, 11),
        (11, 1),
    ]
    assert len({keyed_seed(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("key", "seed"), [((0, "inject", 3), 1942544403490032373), (("split", -1), 3183952484874376085)]
)
def test_draws_are_the_same_in_every_process_and_release(key: tuple[int | str, ...], seed: int) -> None:
    # Recorded once: a resumed run must find the draws of the run that was cut, also after an update.
    assert keyed_seed(*key) == seed


def test_seeds_fit_torch_and_numpy() -> None:
    seeds = [keyed_seed(number) for number in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    np.random.default_rng(seeds[0])
    torch.Generator().manual_seed(max(seeds))


def test_generators_are_independent_of_the_global_state_and_leave_it() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = torch.rand(5, generator=keyed_generator(3, "a"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(5, generator=keyed_generator(3, "a")), first)
    assert not torch.equal(torch.rand(5, generator=keyed_generator(3, "b")), first)


def test_the_keyed_global_state_is_put_back() -> None:
    before = torch.get_rng_state()
    with keyed_global_state(1, "a"):
        first = torch.rand(3)
    again = []

    def fail() -> None:
        with keyed_global_state(1, "a"):
            again.append(torch.rand(3))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(again[0], first)
    with keyed_global_state(2, "a"):
        assert not torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("on_device", [False, True])
def test_cuda_is_seeded_where_it_draws_and_left_alone_elsewhere(on_device: bool) -> None:
    device = torch.device("cuda")
    before = torch.cuda.get_rng_state()
    with keyed_global_state(1, "a", device=device if on_device else None):
        assert torch.equal(torch.cuda.get_rng_state(), before) != on_device
    assert torch.equal(torch.cuda.get_rng_state(), before)
