"""losses.py, and the gradients this project stands for: of each loss alone, through the log-probs, through the model.

Every expected value comes from somewhere else: a closed form in plain Python, finite differences in float64, TRL's own
code, or plain sequences read one at a time.
"""

import inspect
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import gradients, hf_logps, hf_twin, random_pairs, tiny_config, tiny_model, worst
from torch import Tensor

from notus import config as configuration
from notus import losses
from notus.logprobs import sequence_logps, token_logps
from notus.losses import EXAMPLES, LOSSES, METRICS, PreferenceLoss, curves, dpo, dpo_norm, draw, equation_7, ipo
from notus.model import pair_logps
from notus.packing import pack_pairs

ROOT = Path(__file__).parent.parent
BETA = 0.3
DPO = PreferenceLoss("dpo", BETA)
CASES = [
    DPO, PreferenceLoss("dpo", BETA, label_smoothing=0.1), PreferenceLoss("dpo", 0.05, label_smoothing=0.4),
    PreferenceLoss("dpo_norm", 5.0), PreferenceLoss("dpo_norm", 2.0, label_smoothing=0.2), PreferenceLoss("ipo", 0.1),
    PreferenceLoss("ipo", 0.9), PreferenceLoss("simpo", 2.5), PreferenceLoss("simpo", 2.0, margin=1.6),
    PreferenceLoss("apo_zero", 0.1), PreferenceLoss("dpo", BETA, nll_weight=1.0),
    PreferenceLoss("simpo", 2.5, margin=0.3, nll_weight=0.2),
]  # fmt: skip
of_each = pytest.mark.parametrize("loss", CASES, ids=str)


def random_numbers(num_pairs: int, seed: int = 0, scale: float = 5.0) -> tuple[Tensor, Tensor, Tensor]:
    """policy, reference (P, 2) in float64, the first with gradient, and tokens (P, 2)."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (
        scale * torch.randn(num_pairs, 2, generator=generator, dtype=torch.float64) - 50 for _ in range(2)
    )
    return policy.requires_grad_(), reference, torch.randint(1, 40, (num_pairs, 2), generator=generator)


def closed_form(loss: PreferenceLoss, policy, reference, tokens) -> tuple[float, float, float]:
    """Of one pair, in plain Python: the loss, and its derivative by the chosen and by the rejected log-probability.

    With s the sigmoid, s'(x) = s(x) s(-x). So (-log s(x))' = -s(-x), and with the label smoothing e,
    (-(1 - e) log s(x) - e log s(-x))' = -(1 - e) s(-x) + e s(x) = -(s(-x) - e).
    """

    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    (win, lose), (win_ref, lose_ref), (n_w, n_l) = policy, reference, tokens
    beta, e = loss.beta, loss.label_smoothing
    if loss.name == "dpo":
        x, by_w, by_l = beta * ((win - win_ref) - (lose - lose_ref)), beta, -beta
    elif loss.name == "dpo_norm":
        x, by_w, by_l = beta * ((win - win_ref) / n_w - (lose - lose_ref) / n_l), beta / n_w, -beta / n_l
    elif loss.name == "simpo":
        x, by_w, by_l = beta / n_w * win - beta / n_l * lose - loss.margin, beta / n_w, -beta / n_l
    if loss.name == "ipo":
        x = (win - win_ref) / n_w - (lose - lose_ref) / n_l - 1 / (2 * beta)
        value, slopes = x * x, [2 * x / n_w, -2 * x / n_l]
    elif loss.name == "apo_zero":
        up, down = s(beta * (win - win_ref)), s(beta * (lose - lose_ref))
        value, slopes = 1 - up + down, [-beta * up * (1 - up), beta * down * (1 - down)]
    else:
        value = (1 - e) * math.log1p(math.exp(-x)) + e * math.log1p(math.exp(x))
        slopes = [-(s(-x) - e) * by_w, -(s(-x) - e) * by_l]
    return value - loss.nll_weight * win / n_w, slopes[0] - loss.nll_weight / n_w, slopes[1]


def largest_difference(loss: PreferenceLoss) -> tuple[float, float]:
    """From the closed form, of values and of gradients, relative to 1 or to the value if that is more."""
    policy, reference, tokens = random_numbers(200)
    found = loss(policy, reference, tokens)
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    rows = zip(policy.tolist(), reference.tolist(), tokens.tolist(), strict=True)
    expected = torch.tensor([closed_form(loss, *row) for row in rows], dtype=torch.float64)
    off = (torch.stack([found, *gradient.unbind(1)], dim=1) - expected).abs() / expected.abs().clamp(min=1)
    return off[:, 0].max().item(), off[:, 1:].max().item()


def metrics_of(loss: PreferenceLoss, *numbers: Tensor) -> dict[str, Tensor]:
    """METRICS by name, (P,) each."""
    metrics = loss.metrics(loss(*numbers), *numbers)  # (P, M)
    assert not metrics.requires_grad
    return dict(zip(METRICS, metrics.unbind(1), strict=True))


# --- the losses alone ------------------------------------------------------------------------------------------------


@of_each
def test_values_and_gradients_are_the_closed_forms(loss: PreferenceLoss):
    """Law 2. The same, to the last digits of float64."""
    assert max(largest_difference(loss)) < 1e-12


@of_each
def test_gradients_by_finite_differences(loss: PreferenceLoss):
    policy, reference, tokens = random_numbers(5)
    assert torch.autograd.gradcheck(lambda policy: loss(policy, reference, tokens), policy)


START = {  # where the policy is the reference: the loss, and minus its slope by the chosen log-prob (of a token)
    "dpo": lambda beta, e: (math.log(2), beta * (1 / 2 - e), False),
    "dpo_norm": lambda beta, e: (math.log(2), beta * (1 / 2 - e), True),
    "ipo": lambda beta, _: (1 / (4 * beta * beta), 1 / beta, True),
    "apo_zero": lambda beta, _: (1.0, beta / 4, False),
}


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("name", LOSSES)
def test_the_known_value_where_the_policy_is_the_reference(name: str, beta: float):
    """Law 1: log 2, 1/(4 beta^2) or 1 exactly, and a gradient that is not zero. SimPO has no reference to be equal to.
    Margins are 0, and a tie counts as wrong."""
    smoothing = 0.2 if "label_smoothing" in LOSSES[name].options else 0.0
    policy, _, tokens = random_numbers(7)
    for loss in {PreferenceLoss(name, beta), PreferenceLoss(name, beta, label_smoothing=smoothing)}:
        loss.check_start(policy.detach(), tokens)
        replace(loss, nll_weight=0.5).check_start(policy.detach(), tokens)
        assert replace(loss, nll_weight=0.5).start is None
        if name == "simpo":
            assert loss.start is None
            continue
        found = loss(policy, policy.detach(), tokens)
        value, slope, per_token = START[name](beta, loss.label_smoothing)
        torch.testing.assert_close(found, torch.full_like(found, value), rtol=1e-14, atol=0)
        assert loss.start == pytest.approx(value, rel=1e-15)
        (gradient,) = torch.autograd.grad(found.sum(), policy)
        expected = slope * torch.tensor([-1.0, 1.0], dtype=torch.float64) / (tokens if per_token else 1)
        torch.testing.assert_close(gradient, expected.expand(7, 2), rtol=1e-13, atol=0)
        metrics = metrics_of(loss, policy, policy.detach(), tokens)
        assert all((metrics[f"rewards/{key}"] == 0).all() for key in ("chosen", "rejected", "margins", "accuracies"))


@pytest.mark.parametrize("start", [lambda beta, _: (0.7, beta / 2), lambda beta, _: (math.log(2), beta / 3)])
def test_a_loss_that_does_not_begin_at_its_known_value_is_refused(start, monkeypatch):
    monkeypatch.setitem(LOSSES, "dpo", LOSSES["dpo"]._replace(start=start))
    with pytest.raises(ArithmeticError, match=r"the (loss|gradient) of dpo, beta 0.3 must be .* and is"):
        DPO.check_start(*random_numbers(3)[1:])


def test_a_reference_that_is_no_number_is_refused():
    with pytest.raises(ArithmeticError, match="and is nan"):
        DPO.check_start(torch.tensor([[-3.0, math.nan]]), torch.ones(1, 2, dtype=torch.int64))


SWAP = {  # the loss with chosen and rejected exchanged, less the loss; x the difference that it looks at
    "dpo": lambda loss, x: (1 - 2 * loss.label_smoothing) * loss.beta * x,
    "dpo_norm": lambda loss, x: (1 - 2 * loss.label_smoothing) * loss.beta * x,
    "ipo": lambda loss, x: 2 * x / loss.beta,  # (-x - c)^2 - (x - c)^2 = 4 x c, c = 1 / (2 beta)
    "simpo": lambda loss, x: loss.beta * x,
}


@pytest.mark.parametrize("loss", [case for case in CASES if not case.nll_weight and not case.margin], ids=str)
def test_exchanging_the_answers(loss: PreferenceLoss):
    """-log s(-x) = x - log s(x). For APO both orders add up to 2."""
    numbers = policy, reference, tokens = random_numbers(50)
    swapped = loss(*(part.flip(1) for part in numbers))
    if loss.name == "apo_zero":
        torch.testing.assert_close(loss(*numbers) + swapped, torch.full_like(swapped, 2.0))
        return
    of_answer = policy if loss.name == "simpo" else policy - reference
    chosen, rejected = (of_answer if loss.name == "dpo" else of_answer / tokens).unbind(1)
    torch.testing.assert_close(swapped - loss(*numbers), SWAP[loss.name](loss, chosen - rejected), atol=1e-11, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@of_each
def test_extreme_margins_stay_finite(loss: PreferenceLoss, dtype: torch.dtype):
    """log(sigmoid(x)) written out would be -inf here. The logistic losses end as a line of slope beta on the wrong
    side, and as nothing on the right one."""
    far = torch.tensor([[1e5, -1e5], [-1e5, 1e5], [-1e5, -1e5], [0.0, 0.0], [-1e-6, 0.0]], dtype=dtype)
    policy = far.requires_grad_()
    tokens = torch.ones(5, 2, dtype=torch.int64)
    found = loss(policy, torch.zeros_like(policy), tokens)
    found.sum().backward()
    assert found.dtype == dtype and found.isfinite().all() and policy.grad.isfinite().all()
    if not loss.label_smoothing and not loss.nll_weight:
        chosen, rejected = policy.grad[:2].float().T
        if loss.name in ("dpo", "dpo_norm", "simpo"):
            beta = torch.tensor(loss.beta).to(dtype).item()
            assert chosen.tolist() == [0.0, -beta] and rejected.tolist() == [0.0, beta] and found[0] == 0
        if loss.name == "apo_zero":
            assert found[:2].tolist() == [0.0, 2.0] and not chosen.any() and not rejected.any()


def test_what_the_members_have_in_common():
    policy, reference, tokens = random_numbers(20)
    equal = torch.full_like(tokens, 8)
    torch.testing.assert_close(dpo_norm(policy, reference, equal, 8 * BETA), dpo(policy, reference, equal, BETA))
    for loss in CASES:  # what shifts both models alike is nothing to a loss with a reference
        if LOSSES[loss.name].reference and not loss.nll_weight:
            torch.testing.assert_close(loss(policy + 7, reference + 7, tokens), loss(policy, reference, tokens))
    without = PreferenceLoss("simpo", 2.0, margin=0.5)
    assert torch.equal(without(policy, reference, tokens), without(policy, torch.zeros_like(reference), tokens))
    # A reference of 0 and no margin: SimPO is the length-normalized DPO.
    torch.testing.assert_close(
        PreferenceLoss("simpo", 2.0)(policy, reference, tokens), dpo_norm(policy, 0 * reference, tokens, 2.0)
    )


def test_metrics_by_hand():
    policy = torch.tensor([[-10.0, -12.0], [-20.0, -8.0], [-5.0, -5.0]])  # chosen, rejected
    reference = torch.tensor([[-11.0, -10.0], [-15.0, -10.0], [-6.0, -10.0]])
    tokens = torch.tensor([[5, 4], [10, 2], [1, 5]])
    metrics = metrics_of(PreferenceLoss("dpo", 0.5), policy, reference, tokens)
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
    for name in ("dpo_norm", "ipo", "apo_zero"):  # the same rewards at the same beta, whatever the loss compares
        others = metrics_of(PreferenceLoss(name, 0.5), policy, reference, tokens)
        assert {key: others[key].tolist() for key in expected} == expected
    without = metrics_of(PreferenceLoss("simpo", 0.5), policy, reference, tokens)
    assert without["rewards/chosen"].tolist() == [-1.0, -1.0, -2.5]  # 0.5 * policy / tokens
    assert without["rewards/rejected"].tolist() == [-1.5, -2.0, -0.5]


# --- the settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hinge", 0.1), "there is no loss 'hinge'; there are dpo, dpo_norm, ipo, simpo, apo_zero"),
        (("dpo", 0.0), "beta 0.0 is out of range"), (("dpo", math.nan), "beta nan is out of range"),
        (("dpo", 0.1, 0.5), "label_smoothing 0.5 is out of range"), (("simpo", 2.0, 0.0, -1.0), "margin -1.0"),
        (("dpo", 0.1, 0.0, 0.0, math.inf), "nll_weight inf is out of range"),
        (("ipo", 0.1, 0.1), "ipo has no label_smoothing"), (("simpo", 2.0, 0.1), "simpo has no label_smoothing"),
        (("apo_zero", 0.1, 0.1), "apo_zero has no label_smoothing"), (("dpo", 0.1, 0.0, 0.5), "dpo has no margin"),
    ],
)  # fmt: skip
def test_a_setting_that_would_be_ignored_is_refused(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        PreferenceLoss(*arguments)


def test_the_settings_are_those_of_the_functions():
    """And of config.py, which must not wait for torch, and so has a table of its own."""
    for name, member in LOSSES.items():
        assert member.function is getattr(losses, name)
        assert tuple(inspect.signature(member.function).parameters)[4:] == member.options
        assert (member.start is not None) == member.reference
    assert {name: (one.betas, one.options) for name, one in LOSSES.items()} == configuration.LOSSES


# --- beside others' code ---------------------------------------------------------------------------------------------

OF_TRL = {  # by TRL's name
    "sigmoid": PreferenceLoss("dpo", 0.1), "sigmoid_norm": PreferenceLoss("dpo_norm", 5.0),
    "ipo": PreferenceLoss("ipo", 0.2), "apo_zero": PreferenceLoss("apo_zero", 0.05),
}  # fmt: skip


def trl_loss(loss_types: list[str], weights: list[float], beta: float, smoothing: float = 0.0, micro_batch: int = 6):
    """TRL's DPOTrainer._compute_loss itself, asked for one micro-batch after another of 6 pairs whose answers have 1 to
    9 tokens. -> mean loss, its gradient by the token log-probs, what it logged, and the six numbers (P, 2) each."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="TRL is not installed: pip install -e '.[bench]'")
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 10, (6, 2), generator=generator)
    per_token = -3 * torch.rand(6, 2, 9, generator=generator)
    per_token = (per_token * (torch.arange(9) < tokens[..., None])).requires_grad_()
    reference = (per_token.detach().sum(2) + torch.randn(6, 2, generator=generator)).float()
    found, logged = [], {"train": {}}

    class Logged(dict):
        def __missing__(self, key: str) -> list:
            return self.setdefault(key, [])

    logged = {"train": Logged()}
    for rows in torch.arange(6).split(micro_batch):
        part = per_token[rows].transpose(0, 1).reshape(-1, 9)  # all chosen, then all rejected
        mask = (torch.arange(9) < tokens[rows].T.reshape(-1, 1)).long()
        mask = torch.cat([torch.zeros(len(mask), 1, dtype=torch.int64), mask], dim=1)  # a prompt of one token
        zeros = torch.zeros_like(part).detach()
        outputs = SimpleNamespace(log_probs=part, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

        def model(outputs=outputs, **_: object) -> SimpleNamespace:
            return outputs

        model.training = True
        alone = SimpleNamespace(
            device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x, unwrap_model=lambda x: x
        )
        me = SimpleNamespace(
            model=model, accelerator=alone, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
            f_divergence_type="reverse_kl", loss_types=loss_types, loss_weights=weights, beta=beta,
            label_smoothing=smoothing, use_weighting=False, _metrics=logged, _total_train_tokens=0, _tp_size=1,
        )  # fmt: skip
        inputs = {
            "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
            "ref_chosen_logps": reference[rows, 0], "ref_rejected_logps": reference[rows, 1],
        }  # fmt: skip
        found.append(trainer.DPOTrainer._compute_loss(me, model, inputs, False))
    loss = torch.stack(found).mean()
    (gradient,) = torch.autograd.grad(loss, per_token)
    policy = per_token.detach().sum(2).requires_grad_()
    return loss.item(), gradient, logged["train"], (policy, reference, tokens)


def ours(loss: PreferenceLoss, policy: Tensor, reference: Tensor, tokens: Tensor) -> tuple[float, Tensor]:
    """Mean loss, and its gradient by every token's log-prob, (P, 2, 9)."""
    found = loss(policy, reference, tokens).mean()
    (gradient,) = torch.autograd.grad(found, policy)
    return found.item(), gradient[..., None] * (torch.arange(9) < tokens[..., None])


@pytest.mark.parametrize("name", OF_TRL)
def test_values_gradients_and_rewards_are_trls(name: str):
    loss = OF_TRL[name]
    theirs, gradient, logged, numbers = trl_loss([name], [1.0], loss.beta)
    value, by_token = ours(loss, *numbers)
    assert value == pytest.approx(theirs, rel=1e-6)
    torch.testing.assert_close(by_token, gradient * (by_token != 0), rtol=1e-5, atol=1e-8)
    metrics = metrics_of(loss, *numbers)
    for key in METRICS[1:]:
        assert metrics[key].mean().item() == pytest.approx(logged[key][0], rel=1e-5, abs=1e-7), key


def test_simpo_is_that_of_trls_cpo_trainer():
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="TRL: pip install -e '.[bench]'")
    me = SimpleNamespace(
        alpha=0.0, beta=2.5, label_smoothing=0.0, loss_type="simpo", simpo_gamma=1.375,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    policy, reference, tokens = random_numbers(40)
    mean = policy / tokens
    theirs, chosen, rejected = trainer.CPOTrainer.cpo_loss(me, *mean.unbind(1))
    loss = PreferenceLoss("simpo", 2.5, margin=1.375)
    torch.testing.assert_close(loss(policy, reference, tokens), theirs, rtol=1e-12, atol=1e-14)
    expected = torch.autograd.grad(theirs.sum(), policy)
    assert worst(dict(enumerate(torch.autograd.grad(loss(policy, reference, tokens).sum(), policy))),
                 dict(enumerate(expected))) < 1e-13  # fmt: skip
    torch.testing.assert_close(loss.rewards(policy, reference, tokens).detach(), torch.stack([chosen, rejected], 1))


def test_where_trl_differs_on_purpose():
    """1. TRL's sigmoid takes a label_smoothing and ignores it. Ours is applied.
    2. TRL's sft loss is a mean over the tokens of a micro-batch, so that micro-batches decide the result. Ours is a
    mean over pairs, as in the paper of RPO. They agree where every micro-batch is one pair."""
    theirs, _, _, numbers = trl_loss(["sigmoid"], [1.0], 0.1, smoothing=0.3)
    plain, smooth = PreferenceLoss("dpo", 0.1), PreferenceLoss("dpo", 0.1, label_smoothing=0.3)
    assert plain(*numbers).mean().item() == pytest.approx(theirs, rel=1e-6)
    assert abs(smooth(*numbers).mean().item() - theirs) > 1e-3

    rpo = PreferenceLoss("dpo", 0.1, nll_weight=0.7)
    each, gradient, _, _ = trl_loss(["sigmoid", "sft"], [1.0, 0.7], 0.1, micro_batch=1)
    value, by_token = ours(rpo, *numbers)
    assert value == pytest.approx(each, rel=1e-6)
    torch.testing.assert_close(by_token, gradient * (by_token != 0), rtol=1e-5, atol=1e-8)
    together, _, _, _ = trl_loss(["sigmoid", "sft"], [1.0, 0.7], 0.1, micro_batch=6)
    assert abs(value - together) > 1e-3


def test_where_the_papers_and_their_code_differ():
    """1. The equation of IPO has the log-ratios of whole answers; they are those of the average token if every answer
    is one token. 2. The authors of SimPO set gamma / beta, as a difference of average log-probs."""
    policy, reference, tokens = random_numbers(20)
    whole = ((policy - reference)[:, 0] - (policy - reference)[:, 1] - 1 / (2 * BETA)) ** 2
    torch.testing.assert_close(ipo(policy, reference, torch.ones_like(tokens), BETA), whole)
    assert not torch.allclose(ipo(policy, reference, tokens, BETA), whole)

    beta, gamma_beta_ratio = 2.0, 0.8  # Mistral-Base in the authors' README
    mean = policy / tokens
    theirs = -torch.nn.functional.logsigmoid(beta * (mean[:, 0] - mean[:, 1] - gamma_beta_ratio))
    found = PreferenceLoss("simpo", beta, margin=beta * gamma_beta_ratio)(policy, reference, tokens)
    torch.testing.assert_close(found, theirs)


# --- through the log-probs -------------------------------------------------------------------------------------------


@of_each
def test_gradient_through_the_log_probs_by_finite_differences(loss: PreferenceLoss):
    """From the loss back to the hidden states and to the head, answers of 1 to 4 tokens, two chunks of rows."""
    generator = torch.Generator().manual_seed(0)
    sequence = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])  # chosen, rejected, chosen, rejected
    hidden = torch.randn(len(sequence), 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(9, (len(sequence),), generator=generator)
    reference = torch.randn(2, 2, generator=generator, dtype=torch.float64) - 5

    def total(hidden: Tensor, head: Tensor) -> Tensor:
        policy = sequence_logps(token_logps(hidden, head, target, chunk_rows=6), sequence, 4).view(2, 2)
        return loss(policy, reference, torch.tensor([[3, 2], [1, 4]])).sum()

    assert torch.autograd.gradcheck(total, (hidden, head))


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


def packed_loss(model, pairs, reference, loss: PreferenceLoss = DPO) -> Tensor:
    """What train.py computes: mean over pairs, prompts shared."""
    stream = pack_pairs(pairs)
    return loss(pair_logps(model, stream), reference, stream.tokens.view(-1, 2)).sum() / len(pairs)


def test_the_tokens_of_a_stream_are_those_that_are_summed(setting):
    _, pairs, _ = setting
    stream = pack_pairs(pairs)
    assert stream.tokens.view(-1, 2).tolist() == [[len(pair.chosen), len(pair.rejected)] for pair in pairs]
    assert stream.tokens.tolist() == torch.bincount(stream.sequence).tolist()
    assert pack_pairs([]).tokens.view(-1, 2).shape == (0, 2)  # of a rank that has no pair


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

    separately = []
    for pair, logps_ref in zip(pairs, reference, strict=True):
        chosen = pair_logps(model, pack_pairs([pair._replace(rejected=pair.chosen)]))[0, 0]
        rejected = pair_logps(model, pack_pairs([pair._replace(chosen=pair.rejected)]))[0, 1]
        policy = torch.stack([chosen, rejected])[None]
        separately.append(DPO(policy, logps_ref[None], torch.ones(1, 2)))
    separate = gradients(torch.cat(separately).mean(), model)
    assert worst(shared, separate) < 1e-11


@pytest.mark.parametrize("loss", [DPO, *(case for case in CASES[1:] if case in CASES[3::2])], ids=str)
def test_gradient_through_the_model_by_finite_differences(setting, loss: PreferenceLoss):
    """Every parameter tensor, along random directions v: (L(w + h v) - L(w - h v)) / 2h = <grad L, v> + O(h^2)."""
    model, pairs, reference = setting
    gradient = gradients(packed_loss(model, pairs, reference, loss), model)
    generator = torch.Generator().manual_seed(2)
    h = 1e-5
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        around = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * h * direction
                around.append(packed_loss(model, pairs, reference, loss).item())
                parameter -= sign * h * direction
        slope = (around[0] - around[1]) / (2 * h)
        expected = (gradient[name] * direction).sum().item()
        assert slope == pytest.approx(expected, rel=1e-6, abs=1e-9), name


@of_each
def test_a_step_against_the_gradient_widens_the_margin(setting, loss: PreferenceLoss):
    """The sign of it all: after a small step the chosen answers have gained on the rejected ones."""
    model, pairs, reference = setting
    loss = replace(loss, nll_weight=0.0)
    tokens = pack_pairs(pairs).tokens.view(-1, 2)

    def margin() -> float:
        with torch.no_grad():
            policy = pair_logps(model, pack_pairs(pairs))
        numbers = policy / tokens if loss.member.per_token else policy - reference
        return (numbers[:, 0] - numbers[:, 1]).mean().item()

    before = margin()
    gradient = gradients(packed_loss(model, pairs, reference, loss), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 1e-4 * gradient[name]
    assert margin() > before


# --- python -m notus.losses ------------------------------------------------------------------------------------------


def test_the_quantities_of_equation_7():
    """Worked out here from the printed log-probs alone."""
    rows = equation_7(beta=0.1)
    for i in range(2):
        win, lose, win_ref, lose_ref, *rest = (values[i] for values in rows.values())
        up, down = 0.1 * (win - win_ref), 0.1 * (lose - lose_ref)
        weight = 1 / (1 + math.exp(up - down))
        expected = [win - win_ref, lose - lose_ref, up, down, up - down, 1 - weight, -math.log(1 - weight), weight,
                    -0.1 * weight, 0.1 * weight]  # fmt: skip
        assert rest == pytest.approx(expected, rel=1e-9)
    page = (ROOT / "docs" / "dpo.md").read_text(encoding="utf-8")
    assert [rows[name][0] for name in ("log pi(y_w|x)", "log pi(y_l|x)")] == [
        float(number) for number in re.findall(r"^logps/\w+ +(-[\d.]+)$", page, re.MULTILINE)
    ]


def test_the_command_prints_the_example_and_the_table():
    done = subprocess.run([sys.executable, "-m", "notus.losses"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    for name in equation_7():
        assert f"\n{name} " in done.stdout
    assert losses.table() in done.stdout and all(f"\n{each} " in done.stdout for each in EXAMPLES)


def test_the_readme_has_the_table_and_a_small_picture():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert losses.table() in readme and "docs/losses.png" in readme
    assert (ROOT / "docs" / "losses.png").stat().st_size < 150_000


def test_the_curves_are_losses_and_their_slopes():
    """Half of the margin is the chosen answer's, so the loss falls by half of what the two gradients say together."""
    margins = torch.linspace(-40, 40, 2001, dtype=torch.float64)
    for loss in EXAMPLES:
        values, slope = curves(loss, margins)
        expected = torch.gradient(values, spacing=(margins,))[0]
        torch.testing.assert_close(slope[1:-1], expected[1:-1], atol=1e-5, rtol=0)


def test_the_picture_is_drawn(tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    assert losses.main(["--plot", str(tmp_path / "losses.png")]) == 0
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "losses.png") in capsys.readouterr().out
    assert losses.main(["--plot", str(tmp_path / "no" / "losses.png")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_without_matplotlib_the_picture_says_what_to_install(monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape("pip install -e '.[plots]'")):
        draw(tmp_path / "losses.png")
