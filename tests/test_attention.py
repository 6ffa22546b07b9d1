"""attention.py against the drawing in packing.py, taken literally: a T x T mask and a softmax by hand, in float64."""

import pytest
import torch
from torch import Tensor

from notus.attention import KVCache, PackedAttention
from notus.packing import Segment

HEAD_DIM = 4
SEGMENTS = {
    "a pair": [Segment(3, (2, 3))],
    "prompt alone": [Segment(5, ())],
    "plain sequence": [Segment(2, (4,))],
    "three answers": [Segment(4, (3, 1, 5))],
    "shortest": [Segment(1, (1, 1))],
    "equal shapes": [Segment(3, (2, 2)), Segment(3, (2, 2))],
    "all of them": [Segment(2, (4,)), Segment(3, (2, 3)), Segment(5, ()), Segment(1, (1, 1)), Segment(4, (3, 1, 5))],
}
WINDOWS = [None, 1, 2, 4, 100]
HEADS = [(1, 1), (2, 2), (4, 2), (4, 1), (8, 1)]


def drawn_mask(segments: list[Segment], window: int | None) -> Tensor:
    """Who sees whom, token by token: (T, T)."""
    tokens = []  # (segment, answer or None for the prompt, position)
    for number, (prompt, answers) in enumerate(segments):
        tokens += [(number, None, position) for position in range(prompt)]
        for answer, length in enumerate(answers):
            tokens += [(number, answer, prompt + i) for i in range(length)]

    def sees(query: tuple, key: tuple) -> bool:
        related = query[0] == key[0] and (key[1] is None or key[1] == query[1])
        distance = query[2] - key[2]
        return related and distance >= 0 and (window is None or distance < window)

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens])


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """(l, H, d), (s, K, d), (s, K, d), (l, s) -> (l, H, d). Query head h reads key head h // (H / K)."""
    group = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // group].T / query.shape[2] ** 0.5  # (l, s)
        weights = scores.exp() * mask
        heads.append(weights / weights.sum(1, keepdim=True) @ value[:, head // group])
    return torch.stack(heads, dim=1)


def draw(tokens: int, heads: int, kv_heads: int, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = [(tokens, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_the_mask_of_a_pair_is_the_one_drawn_in_packing():
    drawing = """1 0 0 0 0 0 0 0
                 1 1 0 0 0 0 0 0
                 1 1 1 0 0 0 0 0
                 1 1 1 1 0 0 0 0
                 1 1 1 1 1 0 0 0
                 1 1 1 0 0 1 0 0
                 1 1 1 0 0 1 1 0
                 1 1 1 0 0 1 1 1"""
    rows = [[int(cell) for cell in line.split()] for line in drawing.splitlines()]
    assert drawn_mask([Segment(3, (2, 3))], None).int().tolist() == rows


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_packed_attention_is_the_drawing_in_values_and_gradients(segments: list[Segment], window: int | None):
    mask = drawn_mask(segments, window)
    for heads, kv_heads in HEADS:
        inputs = draw(len(mask), heads, kv_heads)
        attend = PackedAttention(segments, window, torch.device("cpu"))
        ours, truth = attend(0, *inputs), dense_attention(*inputs, mask)
        assert torch.allclose(ours, truth, rtol=0, atol=1e-14)
        assert torch.equal(attend(1, *inputs), ours)  # the next layer, over the masks kept from the first
        scale = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for mine, true in zip(
            torch.autograd.grad((ours * scale).sum(), inputs),
            torch.autograd.grad((truth * scale).sum(), inputs),
            strict=True,
        ):
            assert torch.allclose(mine, true, rtol=0, atol=1e-13)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_kv_cache_is_dense_attention_over_all_tokens_so_far(heads: int, kv_heads: int, window: int | None):
    layers, prompts = 2, [3, 1, 6]
    cache = KVCache(
        layers, len(prompts), 9, kv_heads, HEAD_DIM, window, dtype=torch.float64, device=torch.device("cpu")
    )
    past = [[[] for _ in prompts] for _ in range(layers)]  # [layer][sequence]: the (key, value) pieces so far
    lengths = [0, 0, 0]
    for step, new_tokens in enumerate([prompts, [1, 1, 1], [1, 1, 1], [1, 1, 1]]):
        positions, last = cache.advance(new_tokens)
        starts = [0, new_tokens[0], new_tokens[0] + new_tokens[1]]
        expected = [old + i for old, new in zip(lengths, new_tokens, strict=True) for i in range(new)]
        assert positions.tolist() == expected
        assert last.tolist() == [start + new - 1 for start, new in zip(starts, new_tokens, strict=True)]
        for layer in range(layers):
            query, key, value = (x.detach() for x in draw(sum(new_tokens), heads, kv_heads, seed=10 * step + layer))
            out = cache(layer, query, key, value)
            for s, (start, new) in enumerate(zip(starts, new_tokens, strict=True)):
                rows = slice(start, start + new)
                past[layer][s].append((key[rows], value[rows]))
                keys, values = (torch.cat(pieces) for pieces in zip(*past[layer][s], strict=True))
                mask = drawn_mask([Segment(len(keys), ())], window)[lengths[s] :]  # (new, all so far)
                assert torch.allclose(out[rows], dense_attention(query[rows], keys, values, mask), rtol=0, atol=1e-14)
        lengths = [old + new for old, new in zip(lengths, new_tokens, strict=True)]
    assert cache.lengths == lengths == [6, 4, 9]


def test_kv_cache_holds_what_its_docstring_says():
    cache = KVCache(2, 3, 10, 2, HEAD_DIM, None, dtype=torch.float32, device=torch.device("cpu"))
    assert cache.keys.numel() + cache.values.numel() == 2 * 2 * 3 * 2 * 10 * HEAD_DIM
