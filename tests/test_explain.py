"""docs/dpo.md is what `python -m notus.explain` prints, and its numbers obey the laws."""

import ast
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from notus import explain
from notus.chat import with_system_turn

ROOT = Path(__file__).parent.parent
NUMBER = re.compile(r" *-?\d+\.\d+")  # with the blanks in front: a minus takes the place of one


@pytest.fixture(scope="module")
def facts() -> SimpleNamespace:
    return explain.follow()


def printed(capsys: pytest.CaptureFixture) -> str:
    assert explain.main([]) == 0
    return capsys.readouterr().out


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture):
    ours, page = printed(capsys), explain.PAGE.read_text(encoding="utf-8")
    assert NUMBER.split(ours) == NUMBER.split(page), "run: python -m notus.explain > page.md && mv page.md docs/dpo.md"
    for one, other in zip(NUMBER.findall(ours), NUMBER.findall(page), strict=True):
        decimals = len(one.partition(".")[2])
        assert abs(float(one) - float(other)) < 2.5 * 10**-decimals  # other processors round otherwise


def test_a_stale_number_is_replaced_and_the_prose_is_kept(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    page = tmp_path / "page.md"
    page.write_text(
        "before `x`\n```text step\nold\n\nolder\n```\nbetween\n```python\nkept\n```\n```text loss\n```\nafter\n"
    )
    monkeypatch.setattr(explain, "PAGE", page)
    head, step, between, loss, after = re.fullmatch(
        r"(before `x`\n)```text step\n(.*)```\n(between\n```python\nkept\n```\n)```text loss\n(.*)```\n(after\n)",
        printed(capsys),
        re.DOTALL,
    ).groups()
    assert (head, between, after) == ("before `x`\n", "between\n```python\nkept\n```\n", "after\n")
    assert step.startswith("steps     weight      loss\n0 ")
    assert loss.startswith("loss ")
    assert "old" not in step


def test_the_page_has_every_block_once(facts: SimpleNamespace):
    names = re.findall(r"^```\w+ (\w+)$", explain.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(names) == sorted(explain.blocks(facts))


def test_the_page_names_functions_that_exist():
    named = re.findall(r"`([\w/]+\.py)`,\s+`([\w.]+)`", explain.PAGE.read_text(encoding="utf-8"))
    assert len(named) > 15
    for path, name in named:
        body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        for part in name.split("."):
            (node,) = (node for node in body if getattr(node, "name", None) == part)
            body = node.body


# --- the numbers ---------------------------------------------------------------------------------------------------


def test_chosen_has_the_best_mean_and_rejected_a_lower_one(facts: SimpleNamespace):
    means = {one["response"]: one["fine-grained_score"] for one in facts.record["completions"]}
    assert facts.row["chosen"][-1]["content"] == max(means, key=means.get)
    assert means[facts.row["rejected"][-1]["content"]] == facts.row["score_rejected"] < facts.row["score_chosen"]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_prompt_and_answer_are_the_ids_of_the_text(facts: SimpleNamespace, side: str):
    text = facts.base.template.render(with_system_turn(facts.row[side], "")).rstrip()
    tokenizer = facts.base.tokenizer
    assert [*facts.pair.prompt, *getattr(facts.pair, side)] == [tokenizer.bos_id, *tokenizer.encode(text)]


def test_the_stream_holds_the_prompt_once_and_predicts_every_answer_token(facts: SimpleNamespace):
    pair, stream = facts.pair, facts.stream
    assert stream.input_ids.tolist() == [*pair.prompt, *pair.chosen, *pair.rejected]
    assert stream.target.tolist() == [*pair.chosen, *pair.rejected]
    before = [pair.prompt[-1], *pair.chosen[:-1], pair.prompt[-1], *pair.rejected[:-1]]
    assert stream.input_ids[stream.source].tolist() == before


def test_the_picture_of_the_mask_is_the_rule(facts: SimpleNamespace):
    prompt, chosen, rejected = map(len, facts.pair[1:])
    part = torch.tensor([0] * prompt + [1] * chosen + [2] * rejected)
    allowed = (part[None] == 0) | (part[None] == part[:, None])
    assert torch.equal(explain.sees(facts.stream, None), allowed.tril())
    assert explain.sees(facts.stream, 2).sum(1).tolist() == [1] + [2] * (len(part) - 1)


def test_log_probs_sum_to_the_rewards_and_the_loss(facts: SimpleNamespace):
    first, *later = facts.passes
    assert first.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    for one in later:
        logps, old = one.token_logps.double(), first.token_logps.double()
        ratios = [(logps - old)[facts.stream.sequence == answer].sum().item() for answer in (0, 1)]
        assert (one.policy - one.reference).tolist() == pytest.approx(ratios, abs=1e-5)
        margin = explain.BETA * (ratios[0] - ratios[1])
        assert one.loss.item() == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-6)
        assert one.metrics[4].item() == pytest.approx(margin, abs=1e-6)
    assert later[1].loss < later[0].loss < first.loss


def test_equation_7_is_autograds_gradient_and_the_closed_form(facts: SimpleNamespace):
    (_, chosen, by_chosen), (_, rejected, by_rejected), (_, *one), (_, *norm) = facts.gradients
    slope = explain.BETA / (1 + math.exp(facts.passes[1].metrics[4]))  # beta * sigmoid(-logits)
    assert [chosen, by_chosen, -rejected, -by_rejected] == pytest.approx([-slope] * 4, rel=1e-6)
    assert one[0] == pytest.approx(one[1], rel=1e-5)
    assert norm[0] == pytest.approx(norm[1], rel=1e-5)
    assert norm[1] < explain.MAX_GRAD_NORM  # so that clipping changed nothing


def test_the_gradient_of_the_weight_by_finite_differences(facts: SimpleNamespace):
    """The same two steps again in float64, and then the loss a little to both sides of the weight."""
    model = explain.Mistral(facts.base.dims)
    model.initialize(seed=0)
    model.double()
    place, width = (int(facts.pair.chosen[3]), 0), 1e-4
    first = explain.score(model, facts.stream)
    optimizer = explain.make_optimizer(model.parameters(), "rmsprop", explain.LEARNING_RATE, weight_decay=0.0)
    first.loss.backward()
    optimizer.step()
    losses = []
    with torch.no_grad():
        for side in (width, -2 * width):
            model.lm_head.weight[place] += side
            losses.append(explain.score(model, facts.stream, first.token_logps).loss.item())
    assert facts.gradients[2][2] == pytest.approx((losses[0] - losses[1]) / (2 * width), rel=1e-4)


def test_rmsprops_first_step_is_ten_learning_rates(facts: SimpleNamespace):
    assert facts.weights[0] - facts.weights[1] == pytest.approx(10 * explain.LEARNING_RATE, rel=1e-3)
    assert facts.weights[2] < facts.weights[1]
