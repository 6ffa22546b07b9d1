"""optim.py: the schedule is Hugging Face's, the optimizer torch's, and its first step is 10 times the learning rate."""

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from notus.optim import lr_at, make_optimizer, schedule_notes

PEAK = 5e-7


@pytest.mark.parametrize(("total", "warmup"), [(2889, 289), (10, 0), (10, 1), (7, 6), (5, 5), (1, 0), (4, 9)])
def test_lr_is_hugging_faces_linear_schedule_at_every_step(total: int, warmup: int):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    (factor,) = get_linear_schedule_with_warmup(optimizer, warmup, total).lr_lambdas
    for step in range(total + 3):  # past the end it stays at 0
        assert lr_at(step, total, warmup, PEAK) == pytest.approx(PEAK * factor(step), rel=1e-12, abs=0.0)


@pytest.mark.parametrize(("total", "warmup"), [(478, 48), (10, 0), (10, 1), (7, 6), (5, 5), (1, 0), (4, 9)])
def test_lr_is_hugging_faces_cosine_schedule_at_every_step(total: int, warmup: int):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    (factor,) = get_cosine_schedule_with_warmup(optimizer, warmup, total).lr_lambdas
    for step in range(total):  # past the end theirs rises again
        ours = lr_at(step, total, warmup, PEAK, "cosine")
        assert ours == pytest.approx(PEAK * factor(step), rel=1e-9, abs=1e-12 * PEAK)
    assert lr_at(max(total, warmup), total, warmup, PEAK, "cosine") == 0.0


def rmsprop_moves(steps: int) -> list[torch.Tensor]:
    """Of three weights with steady gradients, in units of the learning rate, step by step."""
    gradient = torch.tensor([3.0, -2e-4, 70.0], dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = make_optimizer([weight], "rmsprop", PEAK, weight_decay=0.0)
    moves = []
    for _ in range(steps):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        moves.append((weight.detach() - before) / -PEAK * gradient.sign())
    return moves


def test_rmsprop_moves_every_weight_by_ten_learning_rates_first_and_by_3_2_at_the_tenth():
    moves = rmsprop_moves(10)
    assert torch.allclose(moves[0], torch.full((3,), 10.0, dtype=torch.float64), rtol=1e-3)
    assert torch.allclose(moves[9], torch.full((3,), (1 - 0.99**10) ** -0.5, dtype=torch.float64), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.99, eps=1e-8, weight_decay=0.1)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)),
    ],
)
def test_optimizers_are_torchs_with_the_stated_constants(name: str, theirs):
    start = torch.randn(8, generator=torch.Generator().manual_seed(0))
    ours, reference = (nn.Parameter(start.clone()) for _ in range(2))
    pairs = [(ours, make_optimizer([ours], name, 0.01, weight_decay=0.1)), (reference, theirs([reference]))]
    for _ in range(5):
        for weight, optimizer in pairs:
            optimizer.zero_grad()
            weight.pow(4).sum().backward()
            optimizer.step()
    assert torch.equal(ours, reference)
    assert not torch.equal(ours, start)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="optimizer is 'lion'"):
        make_optimizer([nn.Parameter(torch.zeros(1))], "lion", 0.1, 0.0)


# --- what is unusual about a schedule ------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_nothing_is_said_of_the_recipe_and_of_the_demo(optimizer: str):
    assert schedule_notes(optimizer, warmup_steps=289, total_steps=2889) == []
    assert schedule_notes(optimizer, warmup_steps=17, total_steps=164) == []


@pytest.mark.parametrize("warmup", [0, 2])
def test_few_steps_are_said_and_a_first_one_without_a_rate_where_it_is_so(warmup: int):
    (note,) = schedule_notes("adamw", warmup, 19)
    assert note.startswith("19 steps are few to learn from")
    assert ("first one has a learning rate of 0" in note) == (lr_at(0, 19, warmup, PEAK) == 0.0)
    assert schedule_notes("adamw", warmup, 20) == []


@pytest.mark.parametrize(("warmup", "total"), [(30, 30), (40, 30), (29, 30)])
def test_a_warmup_without_an_end_is_said(warmup: int, total: int):
    reached = max(lr_at(step, total, warmup, PEAK) for step in range(total)) == PEAK
    said = f"warmup takes all {total} steps, so the learning rate never reaches its peak"
    assert schedule_notes("adamw", warmup, total) == ([] if reached else [said])


def test_the_size_of_rmsprops_first_full_step_is_said_where_it_is_more_than_three_rates():
    """The factor is torch's own, after as many steps with a lower rate. AdamW corrects for it."""
    moves = rmsprop_moves(31)
    for warmup in range(31):
        factor = moves[warmup].max().item()
        notes = schedule_notes("rmsprop", warmup, 100)
        assert len(notes) == (factor > 3)
        if notes:
            assert f"after {warmup} warmup steps its step is still {factor:.1f} times the learning rate" in notes[0]
            assert "train.optimizer=adamw" in notes[0]
        assert schedule_notes("adamw", warmup, 100) == []
    assert (len(schedule_notes("rmsprop", 10, 100)), len(schedule_notes("rmsprop", 11, 100))) == (1, 0)
