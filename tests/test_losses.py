"""losses.py, and the gradients this project stands for: of the loss alone, through the log-probs, through the model.

Every expected value comes from somewhere else: a closed form worked out in a docstring, finite differences in float64,
or plain sequences read one at a time.
"""

import math

import numpy as np
import pytest
import torch
from tiny import gradients, hf_logps, hf_twin, random_pairs, tiny_config, tiny_model, worst
from torch import Tensor

from notus.logprobs import sequence_logps, token_logps
from notus.losses import METRICS, dpo_loss, preference_metrics
from notus.model import pair_logps
from notus.packing import pack_pairs

BETA = 0.3
NAMES = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


def random_logps(num_pairs: int, seed: int = 0, scale: float = 5.0) -> list[Tensor]:
    """policy chosen, policy rejected, reference chosen, reference rejected: (P,) each, float64, all with gradient."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(num_pairs, generator=generator, dtype=torch.float64) - 50).requires_grad_()
        for _ in range(4)
    ]


def loss_of(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor,
    beta: float, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """`dpo_loss` as a function of the four log-probabilities in the paper's equation."""
    return dpo_loss(policy_chosen - reference_chosen, policy_rejected - reference_rejected, beta, label_smoothing)


def metrics_of(policy: Tensor, reference: Tensor, beta: float) -> dict[str, Tensor]:
    """policy, reference (P, 2) -> METRICS by name, (P,) each."""
    chosen, rejected = (policy - reference).unbind(1)
    metrics = preference_metrics(dpo_loss(chosen, rejected, beta), policy, chosen, rejected, beta)  # (P, M)
    assert not metrics.requires_grad
    return dict(zip(METRICS, metrics.unbind(1), strict=True))


# --- the loss alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_loss_is_what_the_paper_says(label_smoothing: float):
    """Equation 7 in plain Python: -log sigmoid(x) = log(1 + e^-x), with x = beta * ((w - w_ref) - (l - l_ref))."""
    logps = random_logps(20)
    losses = loss_of(*logps, BETA, label_smoothing)
    for loss, *four in zip(losses, *logps, strict=True):
        chosen, rejected, chosen_ref, rejected_ref = (logp.item() for logp in four)
        x = BETA * ((chosen - chosen_ref) - (rejected - rejected_ref))
        expected = (1 - label_smoothing) * math.log1p(math.exp(-x)) + label_smoothing * math.log1p(math.exp(x))
        assert loss.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradient_of_the_loss_in_closed_form(label_smoothing: float):
    """Law 2. With s the sigmoid and e the label smoothing, s'(x) = s(x) s(-x) gives

        dL/dx = -(1 - e) s(-x) + e s(x) = -(s(-x) - e)

    and x grows by beta with policy chosen and reference rejected, falls by beta with the other two.
    """
    logps = random_logps(20)
    loss_of(*logps, BETA, label_smoothing).sum().backward()
    chosen, rejected, chosen_ref, rejected_ref = (logp.detach() for logp in logps)
    x = BETA * ((chosen - chosen_ref) - (rejected - rejected_ref))
    slope = -(1 / (1 + x.exp()) - label_smoothing)
    for name, tensor, sign in zip(NAMES, logps, (1, -1, -1, 1), strict=True):
        torch.testing.assert_close(tensor.grad, sign * BETA * slope, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradient_of_the_loss_by_finite_differences(label_smoothing: float):
    assert torch.autograd.gradcheck(lambda *logps: loss_of(*logps, BETA, label_smoothing), random_logps(5))


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_policy_equal_to_reference_loses_log_two(beta: float, label_smoothing: float):
    """Law 1: log 2 exactly, margins 0, and a tie counts as wrong; the gradient is beta * (1/2 - e), not zero."""
    chosen, rejected, *_ = random_logps(7)
    logps = chosen, rejected, chosen.detach(), rejected.detach()
    losses = loss_of(*logps, beta, label_smoothing)
    assert (losses - math.log(2)).abs().max() < 1e-15
    policy = torch.stack([chosen, rejected], dim=1)
    metrics = metrics_of(policy, policy.detach(), beta)
    assert all((metrics[f"rewards/{name}"] == 0).all() for name in ("chosen", "rejected", "margins", "accuracies"))
    losses.sum().backward()
    torch.testing.assert_close(chosen.grad, torch.full_like(chosen, -beta * (0.5 - label_smoothing)))
    torch.testing.assert_close(rejected.grad, -chosen.grad)


def test_extreme_margins_stay_finite():
    """log(sigmoid(x)) written out would be -inf here. Far right of the margin nothing is left to learn; far left the
    loss is the margin itself and its slope is beta."""
    zero = torch.zeros(2, dtype=torch.float32)
    chosen = torch.tensor([1e5, -1e5], requires_grad=True)
    losses = dpo_loss(chosen, zero, beta=0.1)
    losses.sum().backward()
    assert losses.tolist() == [0.0, pytest.approx(1e4)]
    assert chosen.grad.tolist() == [0.0, pytest.approx(-0.1)]


def test_metrics_by_hand():
    policy = torch.tensor([[-10.0, -12.0], [-20.0, -8.0], [-5.0, -5.0]])  # chosen, rejected
    reference = torch.tensor([[-11.0, -10.0], [-15.0, -10.0], [-6.0, -10.0]])
    metrics = metrics_of(policy, reference, beta=0.5)
    assert metrics.pop("loss").tolist() == pytest.approx([math.log1p(math.exp(-x)) for x in (1.5, -3.5, -2.0)])
    expected = {
        "rewards/chosen": [0.5, -2.5, 0.5],  # 0.5 * (policy - reference)
        "rewards/rejected": [-1.0, 1.0, 2.5],
        "rewards/accuracies": [1.0, 0.0, 0.0],
        "rewards/margins": [1.5, -3.5, -2.0],
        "logps/chosen": [-10.0, -20.0, -5.0],
        "logps/rejected": [-12.0, -8.0, -5.0],
    }
    assert {name: values.tolist() for name, values in metrics.items()} == expected


# --- through the log-probs -------------------------------------------------------------------------------------------


def test_gradient_through_the_log_probs_by_finite_differences():
    """From the loss back to the hidden states and to the head, answers of 1 to 4 tokens, two chunks of rows."""
    generator = torch.Generator().manual_seed(0)
    sequence = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])  # chosen, rejected, chosen, rejected
    hidden = torch.randn(len(sequence), 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(9, (len(sequence),), generator=generator)
    reference = torch.randn(2, 2, generator=generator, dtype=torch.float64) - 5

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        policy = sequence_logps(token_logps(hidden, head, target, chunk_rows=6), sequence, 4).view(2, 2)
        return dpo_loss(*(policy - reference).unbind(1), BETA).sum()

    assert torch.autograd.gradcheck(loss, (hidden, head))


# --- through the model -----------------------------------------------------------------------------------------------


@pytest.fixture
def setting():
    """A tiny Mistral with a sliding window, 4 pairs, and a reference that differs from the policy by some nats."""
    model = tiny_model(tiny_config(sliding_window=9))
    pairs = random_pairs(np.random.default_rng(0), 4, model.config.vocab_size)
    with torch.no_grad():
        reference = pair_logps(model, pack_pairs(pairs)) + torch.randn(
            4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
    return model, pairs, reference


def packed_loss(model, pairs, reference) -> Tensor:
    """What train.py computes: mean over pairs, prompts shared."""
    policy = pair_logps(model, pack_pairs(pairs))
    return dpo_loss(*(policy - reference).unbind(1), BETA).sum() / len(pairs)


def test_gradient_through_the_model_is_equation_seven(setting):
    """Law 2, section 4 of the paper, "What does the DPO update do?":

        grad L = -beta * E[ sigmoid(r_l - r_w) * (grad log pi(y_w | x) - grad log pi(y_l | x)) ]

    The right side is put together from transformers' model: each answer read alone, as one plain sequence with a full
    log-softmax, and the sigmoid weights worked out by hand. So packing, the shared prompt, chunked log-probs and the
    loss are all on one side, and none of them on the other.
    """
    model, pairs, reference = setting
    ours = gradients(packed_loss(model, pairs, reference), model)

    twin = hf_twin(model)
    expected = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for pair, (chosen_ref, rejected_ref) in zip(pairs, reference, strict=True):
        chosen, rejected = (hf_logps(twin, pair.prompt, answer) for answer in (pair.chosen, pair.rejected))
        chosen_reward, rejected_reward = (
            (BETA * (chosen - chosen_ref)).item(),
            (BETA * (rejected - rejected_ref)).item(),
        )
        weight = 1 / (1 + math.exp(-(rejected_reward - chosen_reward)))  # how wrong the implicit reward is
        chosen_gradient, rejected_gradient = gradients(chosen, twin), gradients(rejected, twin)
        for name, total in expected.items():
            total -= BETA * weight * (chosen_gradient[name] - rejected_gradient[name]) / len(pairs)
    assert worst(ours, expected) < 1e-5  # transformers computes norms and rotary angles in float32
    assert max(gradient.abs().max().item() for gradient in expected.values()) > 1e-3  # and it is not all zeros


def test_shared_prompts_and_separate_sequences_have_one_gradient(setting):
    """The same, to the last digits of float64: pairs one at a time, each answer with a prompt of its own."""
    model, pairs, reference = setting
    shared = gradients(packed_loss(model, pairs, reference), model)

    losses = []
    for pair, logps_ref in zip(pairs, reference, strict=True):
        chosen = pair_logps(model, pack_pairs([pair._replace(rejected=pair.chosen)]))[0, 0]
        rejected = pair_logps(model, pack_pairs([pair._replace(chosen=pair.rejected)]))[0, 1]
        losses.append(loss_of(chosen, rejected, *logps_ref, BETA))
    separate = gradients(torch.stack(losses).mean(), model)
    assert worst(shared, separate) < 1e-11


def test_gradient_through_the_model_by_finite_differences(setting):
    """Every parameter tensor, along random directions v: (L(w + h v) - L(w - h v)) / 2h = <grad L, v> + O(h^2)."""
    model, pairs, reference = setting
    gradient = gradients(packed_loss(model, pairs, reference), model)
    generator = torch.Generator().manual_seed(2)
    h = 1e-5
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * h * direction
                losses.append(packed_loss(model, pairs, reference).item())
                parameter -= sign * h * direction
        slope = (losses[0] - losses[1]) / (2 * h)
        expected = (gradient[name] * direction).sum().item()
        assert slope == pytest.approx(expected, rel=1e-6, abs=1e-9), name


def test_a_step_against_the_gradient_widens_the_margin(setting):
    """The sign of it all: after a small step the chosen answers have gained on the rejected ones."""
    model, pairs, reference = setting

    def margin() -> float:
        with torch.no_grad():
            policy = pair_logps(model, pack_pairs(pairs))
        return metrics_of(policy, reference, BETA)["rewards/margins"].mean().item()

    before = margin()
    gradient = gradients(packed_loss(model, pairs, reference), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 1e-4 * gradient[name]
    assert margin() > before
