"""LoRA (Hu et al. 2021, arXiv:2106.09685): the base is frozen, and each target matrix W learns a correction of rank r.

    y = x W^T + (alpha / r) (x A^T) B^T            W (O, I) frozen; A (r, I) and B (O, r) trained, in float32

B begins at 0. So the policy before its first step is its base, bit for bit, and the reference of a full run over the
same base serves as it is. Of the base there are no gradients and no optimizer state, and it is kept in the compute
dtype. A 7B then takes 14 GB instead of 87 (RMSprop) or 116 (AdamW).

Nothing is renamed: `q_proj.weight` stays, and `q_proj.lora_a` and `q_proj.lora_b` are added.

Legend: T tokens of the stream, I and O inputs and outputs of a linear layer, r rank.
"""

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from notus.distributed import full_tensor, local_rows

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRA(NamedTuple):
    """Fields are named as the settings are."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # of TARGETS, in every layer


class LoRALinear(nn.Linear):
    """A linear layer that `add_lora` has changed in place."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        """(T, I) -> (T, O). A and B cast themselves, so that one process needs no FSDP for it."""
        low_rank = F.linear(x, self.lora_a.to(x.dtype))  # (T, r)
        return torch.addmm(super().forward(x), low_rank, self.lora_b.to(x.dtype).T, alpha=self.scale)


def add_lora(model: nn.Module, lora: LoRA, dtype: torch.dtype) -> None:
    """Freeze `model` in `dtype`, and add A and B, not filled yet, to its target layers."""
    model.to(dtype).requires_grad_(False)
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in lora.targets:
            outputs, inputs = cast(nn.Linear, layer).weight.shape
            layer.__class__ = LoRALinear  # as fully_shard does: weight and bias keep their names
            layer.scale = lora.alpha / lora.rank
            factory: dict[str, Any] = {
                "device": layer.weight.device,
                "dtype": torch.promote_types(dtype, torch.float32),
            }
            layer.lora_a = nn.Parameter(torch.empty(lora.rank, inputs, **factory))
            layer.lora_b = nn.Parameter(torch.empty(outputs, lora.rank, **factory))


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """B = 0, and A uniform within 1 / sqrt(I), as in PEFT (kaiming_uniform_ with a = sqrt(5)). Every rank draws all of
    A and keeps its rows, so that the numbers do not depend on the number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        bound = 1 / math.sqrt(layer.in_features)
        local, rows = local_rows(layer.lora_a)
        local.copy_(torch.empty(layer.lora_a.shape).uniform_(-bound, bound, generator=generator)[rows])
        local_rows(layer.lora_b)[0].zero_()


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """By name, in the model's order; {} where all weights are trained."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


@torch.no_grad()
def merged(layer: LoRALinear) -> Tensor:
    """W + (alpha / r) B A, whole and in float32. All ranks call."""
    weight, a, b = map(full_tensor, (layer.weight, layer.lora_a, layer.lora_b))
    return weight.to(a.dtype).addmm(b, a, alpha=layer.scale)


def peft_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """A and B by PEFT's names, as adapter_model.safetensors holds them."""
    return [
        (f"base_model.model.{name}.lora_{matrix}.weight", tensor)
        for name, layer in lora_layers(model).items()
        for matrix, tensor in (("A", layer.lora_a), ("B", layer.lora_b))
    ]


def peft_config(lora: LoRA, base: str) -> dict[str, Any]:
    """PEFT's adapter_config.json. `base` is the path or the hub's name of the frozen model."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha, "lora_dropout": 0.0,
        "target_modules": list(lora.targets), "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True,
    }  # fmt: skip
