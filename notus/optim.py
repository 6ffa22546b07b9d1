"""Optimizer and learning rate, as the recipe has them."""

from collections.abc import Iterable

import torch
from torch import nn


def make_optimizer(
    parameters: Iterable[nn.Parameter], name: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """`rmsprop`: torch's, with alpha 0.99, eps 1e-8 and no bias correction, the choice of Rafailov et al. (2023,
    appendix B). Its first step is sqrt(1 / (1 - alpha)) = 10 times the learning rate for every weight, 3.2 times by
    the tenth, which is why the recipe warms up. `adamw`: torch's defaults, for comparison."""
    if name == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=learning_rate, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    raise ValueError(f"optimizer is {name!r}; it must be 'rmsprop' or 'adamw'")


def lr_at(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Hugging Face's linear schedule: peak * step / warmup_steps, so 0 at the very first step, then down to 0 at
    `total_steps`. Steps count from 0."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
