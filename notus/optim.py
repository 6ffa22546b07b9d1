"""Optimizer and learning rate, as the recipe has them."""

import math
from collections.abc import Iterable

import torch
from torch import nn


def make_optimizer(
    parameters: Iterable[nn.Parameter], name: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """`rmsprop` is torch's, with alpha 0.99, eps 1e-8 and no bias correction, as in Rafailov et al. (2023, appendix B).
    Its first step is sqrt(1 / (1 - alpha)) = 10 times the learning rate for every weight, and its tenth 3.2 times,
    which is why the recipe warms up. `adamw` is torch's, with its defaults."""
    if name == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=learning_rate, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    raise ValueError(f"optimizer is {name!r}; it must be 'rmsprop' or 'adamw'")


def lr_at(step: int, total_steps: int, warmup_steps: int, peak: float, schedule: str = "linear") -> float:
    """Hugging Face's schedules: peak * step / warmup_steps, which is 0 at the first step, then down to 0 at
    `total_steps`, in a straight line (`linear`) or along half a cosine (`cosine`). Steps count from 0."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    left = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))  # 1 after warmup, 0 at the end
    return peak * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def schedule_notes(optimizer: str, warmup_steps: int, total_steps: int) -> list[str]:
    """What is unusual about a schedule, a sentence each."""
    notes = []
    if total_steps < 20:
        first = ", and the first one has a learning rate of 0" if warmup_steps else ""
        notes.append(f"{total_steps} step{'s are' if total_steps > 1 else ' is'} few to learn from{first}")
    if warmup_steps >= total_steps:
        notes.append(f"warmup takes all {total_steps} steps, so the learning rate never reaches its peak")
    factor = (1 - 0.99 ** (warmup_steps + 1)) ** -0.5  # of RMSprop's step, at the first one of the full rate
    if optimizer == "rmsprop" and factor > 3:
        notes.append(
            f"rmsprop has no bias correction: after {warmup_steps} warmup steps its step is still {factor:.1f} times "
            "the learning rate, which can wreck a model; use train.optimizer=adamw for short runs"
        )
    return notes
