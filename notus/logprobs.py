"""Hidden states -> log-probabilities of the response tokens, without ever holding a (T, V) matrix.

Only response tokens meet the head, a chunk of rows at a time. The log-softmax is float32 whatever the compute dtype is:
in bfloat16 the sum over a 300-token answer is off by half a nat, as much as an early DPO margin.

Legend: R response tokens, D model dimension, V vocabulary, S sequences.
"""

import torch
from torch import Tensor

CHUNK_ROWS = 1024  # rows of logits alive at a time: 1024 x 32000 x 4 bytes = 125 MiB
KEEP_BYTES = 2**29  # of softmax kept for backward; in bfloat16 8,192 rows of 32000


class _TokenLogps(torch.autograd.Function):
    """logp[r] = log_softmax(hidden[r] @ weight.T)[target[r]].

    Its gradient by the logits is onehot(target) - softmax. As long as the softmax fits into `keep_bytes`, it is kept
    for backward and turned into the gradient in place. Otherwise, or if backward runs twice, it is computed again, a
    chunk at a time, at the price of one more product with the head.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, chunk_rows: int, keep_bytes: int) -> Tensor:
        ctx.wide = torch.promote_types(hidden.dtype, torch.float32)
        fits = len(hidden) * len(weight) * hidden.itemsize <= keep_bytes
        ctx.softmax = {}  # chunk -> (chunk, V)
        logps = torch.empty(len(hidden), dtype=ctx.wide, device=hidden.device)
        for rows in _chunks(len(hidden), chunk_rows):
            log_softmax = (hidden[rows] @ weight.T).log_softmax(-1, dtype=ctx.wide)  # (chunk, V)
            logps[rows] = log_softmax.gather(1, target[rows, None]).squeeze(1)
            if fits and any(ctx.needs_input_grad):
                ctx.softmax[rows.start] = log_softmax.exp_().to(hidden.dtype)
            del log_softmax  # not beside the next chunk's
        ctx.save_for_backward(hidden, weight, target, logps)
        ctx.chunk_rows = chunk_rows
        return logps

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, logps = ctx.saved_tensors
        grad_target = -grad * logps.expm1()  # 1 - p, exact however close p is to 1
        grad_hidden = torch.empty_like(hidden)
        # The sum over chunks is kept wide, because bfloat16 additions would lose small terms.
        grad_weight = None
        for rows in _chunks(len(hidden), ctx.chunk_rows):
            softmax = ctx.softmax.pop(rows.start, None)  # it becomes the gradient, in its own memory
            if softmax is None:
                softmax = (hidden[rows] @ weight.T).log_softmax(-1, dtype=ctx.wide).exp_()
            grad_logits = softmax.mul_(-grad[rows, None]).to(weight.dtype)  # (chunk, V)
            grad_logits.scatter_(1, target[rows, None], grad_target[rows, None].to(weight.dtype))
            grad_hidden[rows] = grad_logits @ weight
            if ctx.needs_input_grad[1]:
                product = (grad_logits.T @ hidden[rows]).to(ctx.wide)
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
            del softmax, grad_logits
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(total: int, size: int) -> list[slice]:
    """At least one, which may be empty."""
    return [slice(start, min(start + size, total)) for start in range(0, max(total, 1), size)]


def token_logps(
    hidden: Tensor, weight: Tensor, target: Tensor, chunk_rows: int = CHUNK_ROWS, keep_bytes: int = KEEP_BYTES
) -> Tensor:
    """hidden (R, D), weight (V, D), target (R,) -> log-probabilities (R,), in nats, float32 or wider.

    Memory beyond the inputs and their gradients: `keep_bytes`, and twice `chunk_rows` x V, whatever the length of the
    stream.
    """
    keep_bytes = keep_bytes if torch.is_grad_enabled() else -1  # inside the function, gradients are always off
    return _TokenLogps.apply(hidden, weight, target, chunk_rows, keep_bytes)


def sequence_logps(logps: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sum the token log-probabilities (R,) of each answer -> (S,), in nats. DPO needs the sum, never the mean. Tokens
    with `sequence` S belong to no answer and are left out.

    The sum is taken in float64. One after another in float32, a sum near -5000 would be off by 3e-3.
    """
    total = torch.zeros(num_sequences + 1, dtype=torch.float64, device=logps.device)
    return total.index_add(0, sequence, logps.double())[:num_sequences].to(logps.dtype)
