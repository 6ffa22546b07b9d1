"""attention.py against the drawing in packing.py, taken literally: a T x T mask and a softmax by hand, in float64."""

import pytest
import torch
from torch import Tensor

from notus import attention
from notus.attention import KVCache, PackedAttention, flash_works
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


def kernel(align: str = "lower right", off: int = 0):
    """What FlashAttention's `varlen_attn` computes, by the formula; or what it would with another alignment."""

    def varlen_attn(query, key, value, query_ends, key_ends, most_queries, most_keys, *, window_size, enable_gqa):
        assert enable_gqa and query_ends.dtype == key_ends.dtype == torch.int32
        sizes = query_ends.diff().tolist(), key_ends.diff().tolist()
        assert most_queries >= max(sizes[0]) and most_keys == max(sizes[1])
        assert (len(query), len(key)) == (sum(sizes[0]), sum(sizes[1]))
        left, right = window_size
        out = []
        for q, k, v in zip(query.split(sizes[0]), key.split(sizes[1]), value.split(sizes[1]), strict=True):
            shift = len(k) - len(q) if align == "lower right" else 0
            distance = shift + off + torch.arange(len(q))[:, None] - torch.arange(len(k))  # (l, s)
            mask = (distance >= -right) & ((distance <= left) if left >= 0 else True)
            wide = dense_attention(*(x.double() for x in (q, k, v)), mask)
            out.append(wide.to(query.dtype))
        return torch.cat(out)

    return varlen_attn


@pytest.mark.parametrize("way", ["one_by_one", "at_once"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_packed_attention_is_the_drawing_in_values_and_gradients(
    segments: list[Segment], window: int | None, way: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "varlen_attn", kernel())  # it runs on GPUs only; its pieces are planned anywhere
    monkeypatch.setattr(attention, "GROUPED_HEADS", {"enable_gqa": True})
    mask = drawn_mask(segments, window)
    for heads, kv_heads in HEADS:
        inputs = draw(len(mask), heads, kv_heads)
        attend = getattr(PackedAttention(segments, window, torch.device("cpu")), way)
        ours, truth = attend(*inputs), dense_attention(*inputs, mask)
        assert torch.allclose(ours, truth, rtol=0, atol=1e-14)
        assert torch.equal(attend(*inputs), ours)  # the next layer, over what was kept from the first
        scale = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for mine, true in zip(
            torch.autograd.grad((ours * scale).sum(), inputs),
            torch.autograd.grad((truth * scale).sum(), inputs),
            strict=True,
        ):
            assert torch.allclose(mine, true, rtol=0, atol=1e-13)


def test_flash_attention_is_for_half_precision(monkeypatch: pytest.MonkeyPatch):
    attend = PackedAttention([Segment(3, (2, 3))], None, torch.device("cpu"), flash=True)
    ways = []
    for way in ("one_by_one", "at_once"):
        monkeypatch.setattr(attend, way, lambda query, *_, way=way: ways.append((way, query.dtype)))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        attend(0, *(torch.empty(8, 1, 4, dtype=dtype) for _ in range(3)))
    assert [way for way, _ in ways] == ["one_by_one", "one_by_one", "at_once", "at_once"]


@pytest.mark.parametrize(
    ("align", "off", "works"), [("lower right", 0, True), ("upper left", 0, False), ("lower right", -1, False)]
)
def test_a_kernel_that_aligns_its_mask_otherwise_is_not_used(
    align: str, off: int, works: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
):
    monkeypatch.setattr(attention, "varlen_attn", kernel(align, off))
    monkeypatch.setattr(attention, "GROUPED_HEADS", {"enable_gqa": True})
    assert flash_works.__wrapped__(torch.device("cpu")) == works
    assert [str(warning.message)[:30] for warning in recwarn] == ([] if works else ["FlashAttention is not used, wh"])


def test_a_kernel_that_does_not_run_is_not_used():
    """The real one, on the CPU."""
    with pytest.warns(UserWarning, match="FlashAttention is not used"):
        assert not flash_works.__wrapped__(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 200])
def test_on_a_gpu_flash_attention_is_used_and_agrees_with_float32(window: int | None):
    device = torch.device("cuda")
    assert flash_works(device)
    segments = [Segment(161, (298, 281)), Segment(512, (512, 400)), Segment(1, (1, 2))]
    random = torch.Generator(device).manual_seed(0)
    tokens = sum(prompt + sum(answers) for prompt, answers in segments)
    inputs = [torch.randn(tokens, n, 128, generator=random, device=device) for n in (32, 8, 8)]
    attend = PackedAttention(segments, window, device)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in inputs]
        out = attend(0, *leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, truth in zip(*results, strict=True):
        assert (ours.float() - truth).norm() < 0.02 * truth.norm()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_kv_cache_is_dense_attention_over_all_tokens_so_far(heads: int, kv_heads: int, window: int | None):
    layers, prompts = 2, [3, 1, 6]
    cache = KVCache(len(prompts), 9, window, torch.device("cpu"))
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
    cache = KVCache(3, 10, None, torch.device("cpu"))
    cache.advance([1, 2, 1])
    for layer in range(2):
        cache(layer, *(torch.zeros(4, heads, HEAD_DIM) for heads in (4, 2, 2)))
    assert sum(part.numel() for part in (*cache.keys, *cache.values)) == 2 * 2 * 3 * 2 * 10 * HEAD_DIM
