"""optim.py: the schedule is Hugging Face's, the optimizer torch's, and its first step is 10 times the learning rate."""

import pytest
import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from notus.optim import lr_at, make_optimizer

PEAK = 5e-7


@pytest.mark.parametrize(("total", "warmup"), [(2889, 289), (10, 0), (10, 1), (7, 6), (5, 5), (1, 0), (4, 9)])
def test_lr_is_hugging_faces_linear_schedule_at_every_step(total: int, warmup: int):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total + 3):  # past the end it stays at 0
        assert lr_at(step, total, warmup, PEAK) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=0.0)
        optimizer.step()
        schedule.step()


def test_rmsprop_moves_every_weight_by_ten_learning_rates_first_and_by_3_2_at_the_tenth():
    gradient = torch.tensor([3.0, -2e-4, 70.0], dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = make_optimizer([weight], "rmsprop", PEAK, weight_decay=0.0)
    moves = []
    for _ in range(10):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        moves.append((weight.detach() - before) / -PEAK * gradient.sign())
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
