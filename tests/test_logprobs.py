"""logprobs.py: law 5, chunked log-probs = log_softmax + gather, in values and gradients, without ever an R x V."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from notus.logprobs import sequence_logps, token_logps

R, D, V = 11, 5, 23
CHUNKS = [1, 2, 4, 11, 1000]


def draw(rows: int = R, dtype: torch.dtype = torch.float64, width: int = D, vocab: int = V) -> tuple[Tensor, ...]:
    """hidden (R, D), head (V, D), target (R,) and weights (R,) for a sum over the rows."""
    random = torch.Generator().manual_seed(rows)
    hidden, weight = (torch.randn(n, width, generator=random).to(dtype).requires_grad_() for n in (rows, vocab))
    target = torch.randint(vocab, (rows,), generator=random)
    return hidden, weight, target, torch.randn(rows, generator=random, dtype=torch.float64)


def dense(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None]).squeeze(1)


@pytest.mark.parametrize("keep_bytes", [0, 2**29])  # the softmax computed again, or kept
@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_chunked_is_log_softmax_and_gather_in_values_and_gradients(chunk_rows: int, keep_bytes: int):
    hidden, weight, target, scale = draw()
    ours, truth = token_logps(hidden, weight, target, chunk_rows, keep_bytes), dense(hidden, weight, target)
    assert torch.allclose(ours, truth, rtol=1e-13, atol=1e-13)
    for mine, true in zip(
        torch.autograd.grad((ours * scale).sum(), (hidden, weight)),
        torch.autograd.grad((truth * scale).sum(), (hidden, weight)),
        strict=True,
    ):
        assert torch.allclose(mine, true, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("keep_bytes", [0, 2**29])
@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
def test_gradients_agree_with_finite_differences(chunk_rows: int, keep_bytes: int):
    hidden, weight, target, _ = draw()
    assert torch.autograd.gradcheck(lambda h, w: token_logps(h, w, target, chunk_rows, keep_bytes), (hidden, weight))


def test_the_softmax_is_kept_only_where_a_gradient_is_wanted_and_it_fits():
    hidden, weight, target, _ = draw()
    size = R * V * 8
    for keep_bytes, kept in ((size, True), (size - 1, False)):
        node = token_logps(hidden, weight, target, 4, keep_bytes).grad_fn
        assert len(node.softmax) == (3 if kept else 0)
    with torch.no_grad(), Operations() as operations:
        assert token_logps(hidden, weight, target).grad_fn is None
    assert "aten.exp_.default" not in operations.names  # no softmax is made that nobody wants
    with Operations() as operations:
        token_logps(hidden, weight, target)
    assert "aten.exp_.default" in operations.names


def test_backward_can_run_twice():
    hidden, weight, target, scale = draw()
    loss = (token_logps(hidden, weight, target, 4) * scale).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, (hidden, weight))))


def test_no_rows_give_no_values_and_zero_gradients():
    hidden, weight, target, _ = draw(rows=0)
    logps = token_logps(hidden, weight, target)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert hidden.grad.shape == (0, D)
    assert torch.equal(weight.grad, torch.zeros(V, D, dtype=torch.float64))


def test_a_frozen_head_gets_no_gradient_and_leaves_the_other_unchanged():
    hidden, weight, target, scale = draw()
    both = torch.autograd.grad((token_logps(hidden, weight, target, 4) * scale).sum(), (hidden, weight))
    frozen = weight.detach()
    (alone,) = torch.autograd.grad((token_logps(hidden, frozen, target, 4) * scale).sum(), (hidden,))
    assert torch.equal(alone, both[0])


def test_bfloat16_rounds_the_logits_and_nothing_after_them():
    hidden, weight, target, _ = draw(dtype=torch.bfloat16, width=16)
    logps = token_logps(hidden, weight, target, 4)
    assert logps.dtype == torch.float32
    rounded = (hidden @ weight.T).float()  # (R, V)
    truth = rounded.log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    assert torch.allclose(logps, truth, rtol=1e-6, atol=1e-6)
    # Rounding a logit moves it by 2^-9 of itself at most, and the log-softmax by twice that.
    exact = dense(hidden.float(), weight.float(), target)
    assert (logps - exact).abs().max() <= 2 * 2**-9 * rounded.abs().max()


def test_bfloat16_gradient_of_the_head_does_not_lose_the_small_chunks():
    rows = 4000  # added one by one in bfloat16, the sum would stall at 256 equal terms
    hidden, weight, target, _ = draw(rows, torch.bfloat16, width=4, vocab=7)
    scale = torch.rand(rows, generator=torch.Generator().manual_seed(0))
    mine = torch.autograd.grad((token_logps(hidden, weight, target, 1) * scale).sum(), (hidden, weight))
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    truth = torch.autograd.grad((dense(*wide, target) * scale).sum(), wide)
    for ours, true in zip(mine, truth, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - true).norm() < 5e-3 * true.norm()  # 2^-9 = 2e-3 for each rounding


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that any operation gives out."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    rows, vocab, chunk_rows = 300, 400, 8
    hidden, weight, target, _ = draw(rows, torch.float32, vocab=vocab)
    with LargestTensor() as seen:
        token_logps(hidden, weight, target, chunk_rows).sum().backward()
    assert seen.numel == chunk_rows * vocab  # not rows * vocab
    with LargestTensor() as seen:
        dense(hidden, weight, target).sum().backward()
    assert seen.numel == rows * vocab  # the measure does see one


def test_sum_of_50000_terms_is_the_float32_nearest_to_the_exact_sum():
    terms = torch.from_numpy(-np.random.default_rng(0).exponential(0.1, 50_000).astype(np.float32))
    sequence = torch.zeros(len(terms), dtype=torch.int64)
    exact = math.fsum(terms.tolist())
    assert -5100 < exact < -4900
    total = sequence_logps(terms, sequence, 1)
    assert total.dtype == torch.float32
    assert total.item() == np.float32(exact)
    one_after_another = torch.zeros(1).index_add(0, sequence, terms)
    assert abs(one_after_another.item() - exact) > 10 * abs(total.item() - exact)


def test_each_answer_sums_its_own_tokens_in_any_order_and_an_empty_one_is_zero():
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0], requires_grad=True)
    totals = sequence_logps(logps, torch.tensor([3, 0, 0, 3, 1]), 5)
    assert totals.tolist() == [-6.0, -16.0, 0.0, -9.0, 0.0]
    totals.dot(torch.tensor([1.0, 10.0, 100.0, 1000.0, 1e4])).backward()
    assert logps.grad.tolist() == [1000.0, 1.0, 1.0, 1000.0, 10.0]
