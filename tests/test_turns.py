"""Two functions in turns, as two models are compared: who runs when, and what goes with each."""

import pytest
import torch

from normswap.verification.turns import Turns


def test_they_take_turns_and_keep_their_own_random_numbers():
    turns, order = Turns(), []

    def draws(name, count):
        def run():
            found = []
            torch.manual_seed(7)
            for _ in range(count):
                found.append(torch.rand(()).item())
                order.append(name)
                turns.give()
            return found

        return run

    alone = draws("alone", 0)() or [torch.rand(()).item() for _ in range(4)]
    order.clear()
    before = torch.get_rng_state()
    a, b = turns.run(draws("a", 2), draws("b", 4))
    assert a == alone[:2] and b == alone
    assert order == ["a", "b", "a", "b", "b", "b"]
    assert torch.equal(torch.get_rng_state(), before)


def test_each_has_its_own_default_dtype():
    turns = Turns()

    def wide():
        torch.set_default_dtype(torch.float64)
        turns.give()
        return torch.ones(1).dtype

    def plain():
        turns.give()
        return torch.ones(1).dtype

    assert turns.run(wide, plain) == (torch.float64, torch.float32)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("fails", ["a", "b"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_when_one_fails_the_other_ends(fails, error):
    turns, ran = Turns(), []

    def good():
        for step in range(1000):
            ran.append(step)
            turns.give()

    def bad():
        turns.give()
        raise error("no more")

    with pytest.raises(error, match="no more"):
        turns.run(*((bad, good) if fails == "a" else (good, bad)))
    assert 0 < len(ran) < 5
    assert turns.run(lambda: 1, lambda: 2) == (1, 2)
