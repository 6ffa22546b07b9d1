"""Follow one pair from its raw record to an optimizer step: `python -m notus.explain` prints docs/dpo.md.

The prose is in that file. Each of its blocks that has a name (```text loss) is computed again, by the functions that
train.py calls, on a Mistral small enough for a page. Legend: T tokens of the stream, R response tokens.
"""

import argparse
import io
import json
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from torch.autograd import grad
from torch.nn.utils import clip_grad_norm_, get_total_norm

from notus.attention import PackedAttention
from notus.base import Frame, read_base
from notus.chat import with_system_turn
from notus.demo import Question, Settings, make_pairs, record, write_jsonl, write_shell
from notus.files import sentence
from notus.logprobs import sequence_logps
from notus.losses import METRICS, PreferenceLoss
from notus.model import Mistral
from notus.optim import make_optimizer
from notus.packing import Stream, pack_pairs
from notus.tokens import load_pairs

PAGE = Path(__file__).parent.parent / "docs" / "dpo.md"
BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 1e-4, 1.0
LOSS = PreferenceLoss("dpo", BETA)


def score(model: Mistral, stream: Stream, old: torch.Tensor | None = None) -> SimpleNamespace:
    """token_logps (R,); policy and reference (2,), log-probs of the chosen and the rejected answer; loss; metrics.
    old: the reference's token_logps. None before the first step, when the policy is its own reference."""
    attend = PackedAttention(stream.segments, model.config.sliding_window, stream.input_ids.device)
    new = model(stream.input_ids, stream.positions, attend, stream.source, stream.target)
    policy, reference = (sequence_logps(x, stream.sequence, 2) for x in (new, new.detach() if old is None else old))
    pair = policy[None], reference[None], stream.tokens[None]  # (1, 2) each
    losses = LOSS(*pair)
    metrics = LOSS.metrics(losses, *pair)[0]
    return SimpleNamespace(token_logps=new, policy=policy, reference=reference, loss=losses[0], metrics=metrics)


def gradients(model: Mistral, now: SimpleNamespace, place: tuple[int, int]) -> list[tuple[str, float, float]]:
    """The loss's gradient as section 4 of the paper writes it, and as autograd has it: by the two log-probs, at `place`
    of the head, and its norm over all weights."""
    reward_chosen, reward_rejected = (BETA * (now.policy - now.reference)).detach()
    weight = torch.sigmoid(reward_rejected - reward_chosen).item()
    auto, chosen, rejected = (grad(each, [*model.parameters()], retain_graph=True) for each in (now.loss, *now.policy))
    paper = [-BETA * weight * (c - r) for c, r in zip(chosen, rejected, strict=True)]
    by_chosen, by_rejected = grad(now.loss, now.policy, retain_graph=True)[0].tolist()
    return [
        ("d loss / d log pi(chosen|x)", -BETA * weight, by_chosen),
        ("d loss / d log pi(rejected|x)", BETA * weight, by_rejected),
        ("d loss / d lm_head.weight[{}, {}]".format(*place), paper[-1][place].item(), auto[-1][place].item()),
        ("norm of d loss / d all weights", get_total_norm(paper).item(), get_total_norm(auto).item()),
    ]


def sees(stream: Stream, window: int | None) -> torch.Tensor:
    """(T, T): who sees whom, asked of the attention itself. All scores are equal and value i is the unit vector i, so a
    token's output is above 0 exactly at the places that it sees."""
    size = len(stream.input_ids)
    zeros, units = torch.zeros(size, 1, size), torch.eye(size).unsqueeze(1)  # (T, heads, T)
    return PackedAttention(stream.segments, window, units.device)(0, zeros, zeros, units).squeeze(1) > 0


def follow() -> SimpleNamespace:
    """A record, its pair, and two steps on it. Gradients are of the second: in the first one all log-ratios are 0."""
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # binarize.py's table is not part of the page
        work, file, see = Path(folder), Path(folder, "pairs.jsonl"), SimpleNamespace()
        see.record = record(Random(3), Question("reverse", "LAMP"))
        write_jsonl(work / "raw.jsonl", [see.record])
        make_pairs(work, 42, Settings(test_pairs=0))
        see.row = json.loads(file.read_text())
        write_shell(work, Settings(hidden_size=32, num_layers=2))
        see.base = read_base(work, need_weights=False)
        (see.pair,) = load_pairs([file], see.base.encoder(Frame()), max_length=1024, max_prompt_length=512)

    model, see.stream = Mistral(see.base.dims), pack_pairs([see.pair])
    model.initialize(seed=0)
    optimizer = make_optimizer(model.parameters(), "rmsprop", LEARNING_RATE, weight_decay=0.0)
    place = int(see.pair.chosen[3]), 0  # in the head, a weight of L, a token that only the chosen answer has
    see.passes, see.weights = [score(model, see.stream)], [model.lm_head.weight[place].item()]
    for _ in range(2):
        see.gradients = gradients(model, see.passes[-1], place)
        see.passes[-1].loss.backward()
        clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        see.passes.append(score(model, see.stream, see.passes[0].token_logps.detach()))
        see.weights.append(model.lm_head.weight[place].item())
    return see


def table(widths: Sequence[int], *rows: Iterable, digits: int = 3) -> str:
    """Columns of these widths, to the left where negative."""
    cells = ([f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)
    lines = ([c.rjust(w) if w > 0 else c.ljust(-w) for c, w in zip(row, widths, strict=True)] for row in cells)
    return "\n".join("".join(line).rstrip() for line in lines)


def blocks(see: SimpleNamespace) -> dict[str, str]:
    """The text of each named block of the page."""
    stream, ids, (first, now, _) = see.stream, see.stream.input_ids, see.passes

    def show(some: torch.Tensor) -> list[str]:
        tokens = (see.base.tokenizer.decode([i], skip_special_tokens=False) for i in some.tolist())
        return [token.replace("\n", "\\n").replace(" ", "_") for token in tokens]

    keys = ("model", "response", "fine-grained_score", "overall_score")
    mask = ("   " + "".join(".1"[int(seen)] for seen in row) for row in sees(stream, see.base.dims.sliding_window))
    tokens = zip(range(len(ids)), show(ids), ids.tolist(), stream.positions.tolist(), mask, strict=True)
    old, new = torch.cat([first.token_logps, now.reference]), torch.cat([now.token_logps, now.policy])
    places = [*show(stream.target), "sum", "sum"], [*stream.sequence.tolist(), 0, 1], [*stream.source.tolist(), "", ""]
    rows = zip(*places, old.tolist(), new.tolist(), (new - old).tolist(), strict=True)
    steps = zip(range(3), see.weights, (one.loss.item() for one in see.passes), strict=True)
    return {
        "answers": table((-9, -14, 18, 15), keys, *([one[key] for key in keys] for one in see.record["completions"])),
        "completion": json.dumps(see.record["completions"][1], indent=1),
        "pair": json.dumps(see.row, indent=1),
        "chat": see.base.template.render(with_system_turn(see.row["chosen"], "")).replace("\n", "\\n\n").rstrip(),
        "ids": table((-10, 1), *((part, " ".join(map(str, getattr(see.pair, part)))) for part in see.pair._fields[1:])),
        "stream": table((-7, -16, 5, 10, 1), ("place", "token", "id", "position", "   sees"), *tokens),
        "logps": table((-7, 9, 8, 11, 9, 9), ("target", "sequence", "source", "reference", "policy", "change"), *rows),
        "loss": table((-20, 10), *zip(METRICS, now.metrics.tolist(), strict=True)),
        "gradient": table((-32, 12, 12), ("", "equation 7", "autograd"), *see.gradients, digits=5),
        "step": table((-6, 10, 10), ("steps", "weight", "loss"), *steps, digits=5),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m notus.explain", description=__doc__.partition("\n\n")[0]).parse_args(argv)
    try:
        text, page = blocks(follow()), PAGE.read_text(encoding="utf-8")
        print(re.sub(r"(?ms)^(```\w+ (\w+)\n).*?(?=^```$)", lambda m: f"{m[1]}{text[m[2]]}\n", page), end="")
    except (ValueError, OSError) as error:
        print(f"notus.explain: error: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
