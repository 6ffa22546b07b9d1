"""packing.py. Law 4: sharing prompts and packing change nothing but speed. Also how a step is dealt to ranks, and the
order of training."""

import threading
import time

import numpy as np
import pytest
import torch
from tiny import gradients, hf_logps, hf_twin, logits_of, pair_set, random_pairs, tiny_config, tiny_model, worst
from torch import Tensor

from notus.cost import forward_flops
from notus.model import Mistral, pair_logps, stream_logps
from notus.packing import Segment, ahead, batch, deal, pack, pack_pairs, steps_per_epoch, training_steps
from notus.plan import MISTRAL_7B
from notus.tokens import Pair


def alone(model: Mistral, pairs: list[Pair]) -> Tensor:
    """One sequence at a time, unpacked, with all its logits -> (P, 2)."""
    logps = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(np.concatenate([pair.prompt, answer]).astype(np.int64))
            scores = logits_of(model, ids)[len(pair.prompt) - 1 : -1].log_softmax(-1)  # (R, V)
            logps.append(scores.gather(1, ids[len(pair.prompt) :, None]).sum())
    return torch.stack(logps).view(-1, 2)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_shared_prompts_and_packing_change_neither_log_probs_nor_gradients(window: int | None, tied: bool):
    model = tiny_model(tiny_config(sliding_window=window, tie_word_embeddings=tied))
    pairs = random_pairs(np.random.default_rng(3), 6, model.config.vocab_size)
    pairs.append(Pair("one token each", *(np.array([i], dtype=np.int32) for i in (1, 7, 2))))
    scale = torch.randn(len(pairs), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unshared = pack([(pair.prompt, [answer]) for pair in pairs for answer in (pair.chosen, pair.rejected)])
    assert len(pack_pairs(pairs).input_ids) < len(unshared.input_ids)

    truth = alone(model, pairs)
    truth_gradients = gradients((truth * scale).sum(), model)
    assert truth.min() < -50  # far from zero, so that the agreement below says something
    for ours in (pair_logps(model, pack_pairs(pairs)), stream_logps(model, unshared).view(-1, 2)):
        assert torch.allclose(ours, truth, rtol=1e-13, atol=0)
        assert worst(gradients((ours * scale).sum(), model), truth_gradients) < 1e-12

    twin = hf_twin(model)  # its norms, angles and softmax are float32 even in a float64 model
    theirs = torch.stack([hf_logps(twin, pair.prompt, a) for pair in pairs for a in (pair.chosen, pair.rejected)])
    assert torch.allclose(truth, theirs.view(-1, 2), rtol=1e-5, atol=0)
    assert worst(truth_gradients, gradients((theirs.view(-1, 2) * scale).sum(), twin)) < 1e-4


def test_micro_batches_add_up_to_the_whole():
    model = tiny_model(tiny_config())
    pairs = random_pairs(np.random.default_rng(4), 7, model.config.vocab_size)
    whole = gradients(pair_logps(model, pack_pairs(pairs)).sum(), model)
    for micro_batch in (pairs[:3], pairs[3:4], pairs[4:]):
        pair_logps(model, pack_pairs(micro_batch)).sum().backward()
    assert worst({name: parameter.grad for name, parameter in model.named_parameters()}, whole) < 1e-12


def test_pack_lays_the_pair_drawn_in_its_docstring():
    p0, p1, p2, c0, c1, r0, r1, r2 = range(10, 18)
    stream = pack([([p0, p1, p2], ([c0, c1], [r0, r1, r2]))])
    place = {token: index for index, token in enumerate(stream.input_ids.tolist())}
    assert stream.input_ids.tolist() == [p0, p1, p2, c0, c1, r0, r1, r2]
    assert stream.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert stream.target.tolist() == [c0, c1, r0, r1, r2]
    assert stream.source.tolist() == [place[token] for token in (p2, c0, p2, r0, r1)]
    assert stream.sequence.tolist() == [0, 0, 1, 1, 1]
    assert stream.segments == (Segment(3, (2, 3)),)
    assert stream.num_sequences == 2


def test_pack_continues_counting_over_segments_of_any_number_of_answers():
    stream = pack([([5], ()), (np.array([6, 7]), ([8],)), ([9], ([1], [2, 3], [4]))])
    assert stream.input_ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 4]
    assert stream.positions.tolist() == [0, 0, 1, 2, 0, 1, 1, 2, 1]
    assert stream.target.tolist() == [8, 1, 2, 3, 4]
    assert stream.source.tolist() == [2, 4, 4, 6, 4]
    assert stream.sequence.tolist() == [0, 1, 2, 2, 3]
    assert stream.segments == (Segment(1, ()), Segment(2, (1,)), Segment(1, (1, 2, 1)))
    assert stream.num_sequences == 4
    for tensor in (stream.input_ids, stream.positions, stream.source, stream.target, stream.sequence):
        assert tensor.dtype == torch.int64


def test_an_empty_pack_adds_exactly_nothing_and_reaches_every_parameter():
    model = tiny_model(tiny_config())
    logps = pair_logps(model, pack([]))
    assert logps.shape == (0, 2)
    logps.sum().backward()
    assert logps.sum().item() == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # it takes part in every collective
        assert torch.count_nonzero(parameter.grad) == 0, name


def test_an_answer_without_tokens_scores_zero_and_leaves_the_other_as_it_was():
    model = tiny_model(tiny_config())
    (alone,) = stream_logps(model, pack([([1, 2], [[3, 4]])])).tolist()
    assert stream_logps(model, pack([([1, 2], [[], [3, 4]])])).tolist() == [0.0, pytest.approx(alone, rel=1e-13)]
    assert stream_logps(model, pack([([1, 2], [[3, 4], []])])).tolist() == [pytest.approx(alone, rel=1e-13), 0.0]


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="a prompt needs at least one token"):
        pack([([1], ([2],)), ([], ([3],))])


def test_stream_moves_as_a_whole():
    stream = pack([([1, 2], ([3], [4]))]).to(torch.device("meta"))
    tensors = [value for value in vars(stream).values() if isinstance(value, Tensor)]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 6
    assert stream.segments == (Segment(2, (1, 1)),)


# --- dealing -------------------------------------------------------------------------------------------------------


def ultrafeedback_lengths(pairs: int, seed: int = 42) -> np.ndarray:
    """(P, 3), drawn as benchmarks/step.py draws them: lognormal, the answers of a pair alike, cut as the recipe cuts
    (1024, prompts 512). Their means are UltraFeedback's: 161 tokens of prompt, 298 chosen, 283 rejected."""
    length, both, *own = np.random.default_rng(seed).standard_normal((4, pairs))
    prompt = 110 * np.exp(0.99 * length)
    chosen, rejected = (
        median * np.exp(0.6 * (0.4**0.5 * both + 0.6**0.5 * z)) for median, z in zip((262, 247), own, strict=True)
    )
    prompt = np.where(prompt + np.maximum(chosen, rejected) > 1024, np.minimum(prompt, 512), prompt)
    cut = np.where(prompt + np.maximum(chosen, rejected) > 1024, 512, np.inf)
    return np.stack([prompt, np.minimum(chosen, cut), np.minimum(rejected, cut)], axis=1).clip(2).astype(int)


def waiting(plan: list[list[list[int]]], costs: np.ndarray) -> float:
    """What a step takes beyond a perfectly even one: in every round all wait for the dearest micro-batch."""
    work = np.array([[costs[micro_batch].sum() for micro_batch in micro_batches] for micro_batches in plan])
    return work.max(axis=0).sum() / (work.sum() / len(plan)) - 1


@pytest.mark.parametrize(
    ("pairs", "num_ranks", "budget"),
    [(64, 8, 16384), (64, 8, 4096), (64, 1, 2048), (64, 3, 1700), (5, 8, 4096), (1, 2, 100), (7, 2, 10), (0, 4, 512)],
)
@pytest.mark.parametrize("by", ["tokens", "flops", "neither"])
def test_deal_gives_every_pair_once_within_the_budget_and_the_same_number_of_micro_batches(
    pairs: int, num_ranks: int, budget: int, by: str
):
    lengths = ultrafeedback_lengths(pairs, seed=pairs)
    tokens = lengths.sum(axis=1)
    costs = {"tokens": tokens, "flops": forward_flops(MISTRAL_7B, lengths), "neither": tokens[::-1] ** 2 % 97}[by]
    plan = deal(tokens, costs, num_ranks, budget)
    assert len(plan) == num_ranks
    assert len({len(micro_batches) for micro_batches in plan}) == 1
    assert len(plan[0]) >= 1
    dealt = [i for micro_batches in plan for micro_batch in micro_batches for i in micro_batch]
    assert sorted(dealt) == list(range(pairs))
    for micro_batches in plan:
        for micro_batch in micro_batches:
            assert len(micro_batch) <= 1 or tokens[micro_batch].sum() <= budget
    assert deal(tokens, costs, num_ranks, budget) == plan  # every rank computes it for itself


def test_deal_takes_no_more_micro_batches_than_it_needs():
    assert [len(rank) for rank in deal([10] * 8, [10] * 8, 2, 40)] == [1, 1]
    assert [len(rank) for rank in deal([10] * 8, [10] * 8, 2, 39)] == [2, 2]
    assert deal([100, 1, 1], [100, 1, 1], 1, 10) == [[[0], [1, 2]]]  # longer than the budget: one of its own


def test_deal_trades_what_dearest_first_leaves_uneven():
    """The worst case for three ranks (Graham 1969): dearest first would make 11 of what can be 9."""
    costs = np.array([5, 5, 4, 4, 3, 3, 3])
    assert sorted(costs[micro_batch].sum() for (micro_batch,) in deal([1] * 7, costs, 3, 7)) == [9, 9, 9]


def test_deal_evens_out_costs_and_not_tokens():
    tokens, costs = [6, 2, 2, 2], [3, 3, 1, 1]
    assert sorted(deal(tokens, costs, 2, 100)) == [[[0, 2]], [[1, 3]]]
    assert sorted(deal(tokens, costs, 2, 6)) == [[[0]], [[1, 2, 3]]]  # though uneven: the budget comes first


@pytest.mark.parametrize("budget", [16384, 4096])
def test_no_step_of_ultrafeedback_waits_for_its_slowest_rank_by_more_than_2_percent(budget: int):
    """The real run: 61,619 pairs, 64 a step, 8 ranks; the cost of a pair includes attention. Here is its first epoch;
    the other two are permutations of the same pairs. All 2,889 steps are planned in 10 s."""
    lengths = ultrafeedback_lengths(61_619)
    tokens, costs = lengths.sum(axis=1), forward_flops(MISTRAL_7B, lengths)
    order = batch(len(lengths), len(lengths), seed=42, step=0)
    steps = [order[start : start + 64] for start in range(0, len(order), 64)]
    start = time.process_time()
    plans = [deal(tokens[rows], costs[rows], 8, budget) for rows in steps]
    seconds = time.process_time() - start
    waits = [waiting(plan, costs[rows]) for plan, rows in zip(plans, steps, strict=True)]
    assert max(waits) < 0.02, f"mean {np.mean(waits):.2%}, worst {max(waits):.2%}"
    assert np.mean(waits) < 0.005, f"mean {np.mean(waits):.2%}, worst {max(waits):.2%}"
    assert 3 * seconds < 10, f"{len(steps)} steps planned in {seconds:.1f} s"


# --- the order of training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_pairs", "pairs_per_step"), [(1, 1), (10, 4), (64, 64), (65, 64), (7, 100), (100, 10)])
def test_an_epoch_takes_every_pair_once(num_pairs: int, pairs_per_step: int):
    steps = steps_per_epoch(num_pairs, pairs_per_step)
    orders = []
    for epoch in range(3):
        batches = [batch(num_pairs, pairs_per_step, 42, epoch * steps + k) for k in range(steps)]
        assert [len(b) for b in batches[:-1]] == [pairs_per_step] * (steps - 1)
        assert len(batches[-1]) == num_pairs - (steps - 1) * pairs_per_step > 0
        orders.append(np.concatenate(batches).tolist())
        assert sorted(orders[-1]) == list(range(num_pairs))
    if num_pairs > 5:
        assert orders[0] != orders[1] != orders[2] != orders[0]


# numpy.random.RandomState([42, epoch]).permutation(10), four at a time
GOLDEN = [[5, 0, 6, 4], [2, 7, 3, 1], [8, 9], [3, 1, 2, 9]]


def test_the_order_is_a_function_of_seed_and_epoch_and_frozen():
    assert [batch(10, 4, 42, step).tolist() for step in range(4)] == GOLDEN
    assert batch(10, 4, 42, 1).tolist() == GOLDEN[1]  # no state between calls
    assert batch(10, 4, 43, 0).tolist() != GOLDEN[0]
    assert np.concatenate([batch(10, 5, 42, step) for step in (0, 1)]).tolist() == [*GOLDEN[0], *GOLDEN[1], *GOLDEN[2]]


def test_the_yardsticks_steps():
    assert steps_per_epoch(61_619, 64) == 963
    assert len(batch(61_619, 64, 42, 962)) == 61_619 - 962 * 64


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_micro_batches_of_all_ranks_are_the_pairs_of_the_step(num_ranks: int):
    pairs = pair_set(random_pairs(np.random.default_rng(5), 10, vocab=97))  # steps of 4, 4 and 2 pairs
    settings = {"pairs_per_step": 4, "seed": 42, "budget": 60, "num_ranks": num_ranks}
    costs = pairs.num_tokens**2
    ranks = [list(training_steps(pairs, costs, range(1, 6), rank=r, **settings)) for r in range(num_ranks)]
    for number, of_ranks in enumerate(zip(*ranks, strict=True), 1):
        rows = batch(10, 4, 42, number)
        assert len({len(micro_batches) for _, _, micro_batches in of_ranks}) == 1
        dealt = []
        for step, step_rows, micro_batches in of_ranks:
            assert step == number and np.array_equal(step_rows, rows)
            for members, stream in micro_batches:
                dealt += members.tolist()
                packed = pack_pairs([pairs[i] for i in members])
                assert stream.segments == packed.segments and torch.equal(stream.input_ids, packed.input_ids)
        assert sorted(dealt) == sorted(rows)  # with 3 ranks and 2 pairs, one rank has an empty stream


def test_items_are_made_one_ahead_in_order_and_an_error_comes_in_its_place():
    made, used = [], []

    def make(number: int) -> int:
        if number == 4:
            raise ValueError("no fourth")
        made.append(number)
        return number

    items = ahead(map(make, range(6)))
    with pytest.raises(ValueError, match="no fourth"):
        for number in items:
            used.append(number)
            while len(made) < min(number + 2, 4):  # the next is made while this one is in use
                time.sleep(0.001)
            assert len(made) <= number + 2
    assert used == made == [0, 1, 2, 3]
    assert list(ahead([])) == []
    before = threading.active_count()
    first = ahead(iter(range(10**9)))
    assert next(first) == 0
    first.close()  # a run that ends early leaves no thread behind
    assert threading.active_count() == before
