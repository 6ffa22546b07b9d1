"""Causal attention over a flat stream. The model does not know how its tokens are laid out: each layer calls

    attend(layer, query, key, value) -> (T, H, d)

and one of the two objects below, made for each stream, knows: `PackedAttention` for training (segments with a shared
prompt, see packing.py), `KVCache` for generation.

Legend: T tokens of the stream, H query heads, K key/value heads (H a multiple of K), d head dimension, W sliding
window, S sequences of a cache, C its capacity in tokens, L new tokens of the longest sequence in one call.
"""

import functools
import inspect
import itertools
import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from notus.packing import Segment, to_device

# torch 2.11 groups heads without being told.
GROUPED_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """(l, H, d), (s, K, d), (s, K, d) -> (l, H, d): one sequence through torch's kernels; K divides H (GQA)."""
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # (1, heads, tokens, d)
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


def visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Boolean mask (..., l, s): a query sees keys at its own position and before, W positions in all."""
    distance = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class PackedAttention:
    """Exact attention over a packed stream. Nothing is computed for pairs of tokens that cannot see each other.

    The stream is cut into pieces. A prompt and its first answer are one plain causal sequence, so they are one piece.
    Each further answer is a piece of its own, and the prompt's keys are put before its own keys:

        queries   p p p c c | r r              the stream itself
        keys      p p p c c | p p p r r        a piece's queries are the last tokens of its keys

    Tokens meet by position, so a sliding window is exact too. There are two ways to compute the same pieces:
    `one_by_one`, by SDPA, and on GPUs in half precision `at_once`, a single call of FlashAttention for all of them.

    flash: whether to use `at_once` where the dtype allows it. None means: if it works here, see `flash_works`.
    """

    def __init__(
        self, segments: Sequence[Segment], window: int | None, device: torch.device, flash: bool | None = None
    ):
        self.segments, self.window, self.device = segments, window, device
        self.flash = device.type == "cuda" and flash_works(device) if flash is None else flash
        self._pieces = [size for prompt, answers in segments for size in (prompt + sum(answers[:1]), *answers[1:])]
        self._masks: dict[tuple[int, int], Tensor] = {}  # shared by the layers of one forward pass
        # What a compiled layer reads must be there before. It may not depend on the number of pieces.
        self._layout = self._lay_out() if self.flash else None
        self._segments = torch.tensor(
            [size for prompt, answers in segments for size in (len(answers), prompt, *answers)]
        )

    def __call__(self, _layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.flash and query.dtype in (torch.bfloat16, torch.float16):
            return self.at_once(query, key, value)
        if torch.compiler.is_compiling():
            return _attention(query, key, value, self._segments, self.window)
        return self.one_by_one(query, key, value)

    def at_once(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The kernel aligns its causal mask to the lower right: the last query with the last key, as drawn above."""
        rows, query_ends, key_ends, most_queries, most_keys = self._layout or self._lay_out()
        left = -1 if self.window is None else self.window - 1  # keys before one's own
        sizes = query_ends, key_ends, most_queries, most_keys
        out = varlen_attn(query, key[rows], value[rows], *sizes, window_size=(left, 0), **GROUPED_HEADS)
        return cast(Tensor, out)  # it is a tuple only where the log-sum-exp is asked for too

    def _lay_out(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Where in the stream each piece's keys are (all keys,), where the pieces end among queries and among keys,
        beginning with 0 (pieces + 1,), and bounds on a piece's queries and keys."""
        key_rows, key_sizes, start = [], [], 0
        for prompt, (first, *others) in ((prompt, answers or (0,)) for prompt, answers in self.segments):
            end = start + prompt + first
            key_rows.append(np.arange(start, end))
            key_sizes.append(prompt + first)
            for answer in others:
                key_rows += [np.arange(start, start + prompt), np.arange(end, end + answer)]
                key_sizes.append(prompt + answer)
                end += answer
            start = end
        ends = (torch.from_numpy(np.cumsum([0, *sizes], dtype=np.int32)) for sizes in (self._pieces, key_sizes))
        tensors = torch.from_numpy(np.concatenate(key_rows)), *ends
        rows, query_ends, all_key_ends = (to_device(tensor, self.device) for tensor in tensors)
        # torch 2.15 asks whether the bound is above 128. It always is, or a layer would be compiled twice.
        return rows, query_ends, all_key_ends, max(129, *self._pieces), max(key_sizes)

    def one_by_one(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pieces = zip(*(x.split(self._pieces) for x in (query, key, value)), strict=True)
        out = []
        for prompt, answers in self.segments:
            query, key, value = next(pieces)
            out.append(self._causal(query, key, value))
            shared_key, shared_value = key[:prompt], value[:prompt]
            for _ in answers[1:]:
                query, key, value = next(pieces)
                key, value = torch.cat([shared_key, key]), torch.cat([shared_value, value])  # (prompt + length, K, d)
                out.append(self._causal(query, key, value))
        return torch.cat(out)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The queries are the last tokens of the keys' sequence."""
        rows, cols = len(query), len(key)
        if rows == cols and (self.window is None or cols <= self.window):
            return sdpa(query, key, value, is_causal=True)
        if (rows, cols) not in self._masks:
            positions = torch.arange(cols, device=self.device)
            self._masks[rows, cols] = visible(positions[cols - rows :], positions, self.window)  # (rows, cols)
        return sdpa(query, key, value, mask=self._masks[rows, cols])


# The layers around it are compiled, and each stream has other pieces. So to the compiler `one_by_one` is one operation.


@torch.library.custom_op("notus::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, window: int | None) -> Tensor:
    """`PackedAttention.one_by_one`. `segments` lists, for each segment, the number of its answers, its prompt's length
    and theirs."""
    return _packed(segments, window, query.device).one_by_one(query, key, value)


@torch.library.custom_op("notus::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, segments: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients; SDPA runs once more."""
    attend = _packed(segments, window, query.device)
    pull_back = torch.func.vjp(attend.one_by_one, query, key, value)[1]  # autograd itself is off inside an operation
    grad_query, grad_key, grad_value = pull_back(grad)
    return grad_query, grad_key, grad_value


def _packed(sizes: Tensor, window: int | None, device: torch.device) -> PackedAttention:
    rest, segments = iter(sizes.tolist()), []
    for count in rest:
        segments.append(Segment(next(rest), tuple(itertools.islice(rest, count))))
    return PackedAttention(segments, window, device, flash=False)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ARG001  torch passes it by name
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors)


_attention.register_fake(lambda query, *_: torch.empty_like(query))
_attention_backward.register_fake(lambda _grad, *inputs: tuple(torch.empty_like(x) for x in inputs[:3]))
_attention.register_autograd(
    lambda ctx, grad: (*_attention_backward(grad, *ctx.saved_tensors, ctx.window), None, None), setup_context=_save
)


@functools.cache
def flash_works(device: torch.device) -> bool:
    """Whether `at_once` gives the same as `one_by_one` here, in bfloat16: values and gradients of pieces with more keys
    than queries, with grouped heads, with and without a window. If not, a warning says why. It takes some milliseconds,
    once."""
    random, segments = torch.Generator(device).manual_seed(0), (Segment(70, (9, 130)), Segment(3, (1, 2)))
    shapes = [(70 + 9 + 130 + 3 + 1 + 2, heads, 64) for heads in (4, 2, 2, 4)]
    *inputs, weight = (torch.randn(shape, generator=random, device=device, dtype=torch.bfloat16) for shape in shapes)
    try:
        for window in (None, 50):
            attend = PackedAttention(segments, window, device, flash=False)
            results = []
            for way in (attend.at_once, attend.one_by_one):
                with torch.enable_grad():
                    leaves = [x.clone().requires_grad_() for x in inputs]
                    out = way(*leaves)
                    results.append([out, *torch.autograd.grad(out, leaves, weight)])
            for ours, truth in zip(*results, strict=True):
                error = ((ours - truth).norm() / truth.norm()).item()
                if not error < 0.02:  # bfloat16 rounds to 0.004; a mask that is off by one token is wrong by more
                    raise RuntimeError(f"its results are off by {error:.0%}, with a window of {window}")
    except (RuntimeError, TypeError, ValueError) as error:
        warnings.warn(f"FlashAttention is not used, which costs speed: {error}", stacklevel=2)
        return False
    return True


class KVCache:
    """Keys and values of S sequences, for generation. `advance` decides where the next stream's tokens go, then a
    forward pass stores them and attends. The first stream holds the prompts one after another; each later stream holds
    one token for each sequence.

    Memory: 2 * layers * S * K * C * d elements, in the dtype of the keys that come.
    """

    def __init__(self, num_sequences: int, capacity: int, window: int | None, device: torch.device):
        self.capacity, self.window, self.device = capacity, window, device
        self.keys: list[Tensor] = []  # (S, K, C, d) for each layer
        self.values: list[Tensor] = []
        self.lengths = [0] * num_sequences

    def advance(self, new_tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Sequence s gets `new_tokens[s]` more tokens. Returns `positions (T,)`, and `last (S,)`: the index in the
        stream of each sequence's last token."""
        device = self.device
        counts = torch.tensor(new_tokens, device=device)
        self._sequence = torch.arange(len(new_tokens), device=device).repeat_interleave(counts)  # (T,)
        self._row = torch.cat([torch.arange(n, device=device) for n in new_tokens])  # (T,) place among the new tokens
        self._position = self._row + torch.tensor(self.lengths, device=device)[self._sequence]  # (T,)
        self.lengths = [old + new for old, new in zip(self.lengths, new_tokens, strict=True)]
        self._filled, self._longest = max(self.lengths), max(new_tokens)
        # A place without a token keeps position 0. It sees key 0, so that no row of the mask is empty, which gives NaN.
        query_positions = self._position.new_zeros(len(new_tokens), self._longest)
        query_positions[self._sequence, self._row] = self._position
        key_positions = torch.arange(self._filled, device=device)
        self._mask = visible(query_positions, key_positions, self.window).unsqueeze(1)  # (S, 1, L, filled)
        return self._position, counts.cumsum(0) - 1

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if layer == len(self.keys):
            sequences, (_, heads, width) = len(self.lengths), key.shape
            self.keys.append(key.new_zeros(sequences, heads, self.capacity, width))
            self.values.append(torch.zeros_like(self.keys[layer]))
        keys, values = self.keys[layer], self.values[layer]  # (S, K, C, d)
        keys[self._sequence, :, self._position] = key
        values[self._sequence, :, self._position] = value
        rows = query.new_zeros(len(self.lengths), self._longest, *query.shape[1:])  # (S, L, H, d)
        rows[self._sequence, self._row] = query
        keys, values = keys[:, :, : self._filled], values[:, :, : self._filled]
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(rows.transpose(1, 2), keys, values, self._mask, enable_gqa=grouped)
        return out.transpose(1, 2)[self._sequence, self._row]
