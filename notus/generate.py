"""Ask a checkpoint: one prompt, or a chat in the terminal.

    python -m notus.generate --model DIR --prompt "Why is the sky blue?"
    echo "Why is the sky blue?" | python -m notus.generate --model DIR
    python -m notus.generate --model DIR

Every token is read once. The first stream holds the prompts one after another. Each later stream holds the newest token
of every sequence that is still running:

    a0 a1 a2 | b0 b1   ->   a3 | b2   ->   a4 | b3   ->   a5   ->   ...        after b3 came </s>: b has left

Legend: S sequences, A of them still running, V vocabulary.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from notus.attention import KVCache
from notus.base import Base, Frame, load_model, read_base
from notus.chat import Message
from notus.distributed import World, broadcast
from notus.files import sentence
from notus.model import Mistral
from notus.tokenizer import Tokenizer

# --- decoding ------------------------------------------------------------------------------------------------------


@torch.no_grad()  # FSDP2 does not work in inference mode
def stream(
    model: Mistral,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    world: World | None = None,
) -> Iterator[dict[int, int]]:
    """Continue all prompts at once. Each step yields {index of the prompt: its next token} of those still running. A
    prompt leaves at a token in `stop`, which is not yielded, or after `max_new_tokens`. With a sharded model all ranks
    of its `world` call, and follow what rank 0 has sampled.

    A prompt's answer does not depend on the other prompts, except for the rounding of matrix products of another shape.
    Its noise comes from `seed` and its own tokens alone, so equal prompts get equal answers, and another seed gives
    others.

    Memory beyond the weights is the cache, 2 * layers * S * K * C * d elements, where C = longest prompt +
    max_new_tokens - 1. That is 128 KiB a token and sequence for Mistral-7B in bfloat16. While the prompts are read,
    their activations come on top, and scores of S x H x (longest prompt)^2 where torch has no fused kernel.
    """
    device = world.device if world else model.model.embed_tokens.weight.device
    capacity = max(map(len, prompts)) + max_new_tokens - 1  # the last token is not read again
    cache = KVCache(len(prompts), capacity, model.config.sliding_window, device)
    generators = [noise(seed, prompt) for prompt in prompts]
    unread = dict(enumerate(prompts))  # of the A running sequences, the tokens that the model has yet to read
    for _ in range(max_new_tokens):
        input_ids = torch.tensor([token for tokens in unread.values() for token in tokens], device=device)
        positions, last = cache.advance([len(unread.get(i, ())) for i in range(len(prompts))])
        logits = model(input_ids, positions, cache, last[list(unread)])  # (A, V)
        uniform = torch.stack([torch.rand((), dtype=torch.float64, generator=generators[i]) for i in unread])  # (A,)
        tokens = sample(logits, uniform.to(device), temperature, top_p)
        if world:
            broadcast(tokens)  # else a rank that rounds otherwise might end its loop before the others
        step = {i: token for i, token in zip(unread, tokens.tolist(), strict=True) if token not in stop}
        if not step:
            return
        yield step
        unread = {i: [token] for i, token in step.items()}


def generate(
    model: Mistral,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    world: World | None = None,
) -> list[list[int]]:
    """The complete answers of `stream`. An answer of `max_new_tokens` tokens was cut; a shorter one met a stop
    token."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, max_new_tokens, stop, temperature, top_p, seed, world):
        for i, token in step.items():
            answers[i].append(token)
    return answers


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """logits (A, V), uniform (A,) in [0, 1) -> tokens (A,). Temperature 0 takes the likeliest token. Otherwise
    `uniform` is looked up in the cumulative distribution, so each row has its own noise, the same on a CPU and a
    GPU."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.double() / temperature).softmax(-1)  # (A, V)
    if top_p < 1:
        probs = nucleus(probs, top_p)
    cumulative = probs.cumsum(-1)
    mark = uniform[:, None] * cumulative[:, -1:]  # (A, 1)
    return torch.searchsorted(cumulative, mark, right=True).squeeze(1)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """(A, V) with 0 outside the smallest set of tokens that holds at least `top_p`; not renormalized. Holtzman et al.
    2020 (arXiv:1904.09751), section 3.1."""
    ordered, order = probs.sort(dim=-1, descending=True)
    likelier = ordered.cumsum(-1) - ordered  # (A, V) what the tokens before this one hold
    return torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(likelier >= top_p, 0))


def noise(seed: int, prompt: Sequence[int]) -> torch.Generator:
    """The source of a prompt's random numbers: a function of the seed and the prompt's tokens."""
    digest = hashlib.sha256(repr((seed, list(prompt))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def text_stream(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text as it becomes known. Rare characters take several tokens, and are held back until their last byte is
    there."""
    ids: list[int] = []
    text, shown = "", 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        known = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        if known > shown:
            yield text[shown:known]
            shown = known
    if text[shown:]:
        yield text[shown:]  # the answer ends inside a character


# --- the terminal --------------------------------------------------------------------------------------------------


def chat(reply: Callable[[list[Message]], Iterator[str]]) -> None:
    """Take turns until /exit or the end of input. Ctrl-C stops an answer, and its beginning stays in the
    conversation."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() then has a history and arrow keys
    messages: list[Message] = []
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/exit":
            return
        if line == "/reset":
            messages.clear()
        elif line:
            messages.append({"role": "user", "content": line})
            answer = ""
            with suppress(KeyboardInterrupt):
                for piece in reply(messages):
                    print(piece, end="", flush=True)
                    answer += piece
            print()
            messages.append({"role": "assistant", "content": answer})


def model_arguments() -> argparse.ArgumentParser:
    """What every command that asks a model takes besides its directory: a parent for `argparse`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on cuda, else float32"
    )
    system = parser.add_mutually_exclusive_group()
    system.add_argument("--system", metavar="TEXT", help="system turn to insert (default: as trained, else empty)")
    system.add_argument("--no-system", action="store_true", help="insert no system turn")
    parser.add_argument(
        "--bos", action=argparse.BooleanOptionalAction, help="put BOS in front (default: as trained, else yes)"
    )
    return parser


def choose_frame(base: Base, bos: bool | None = None, system: str | None = None, no_system: bool = False) -> Frame:
    """The frame in which the model was trained, or Zephyr's if nothing is known, with what the flags change. On stderr
    stands what a user should know: the notes on the files, and each change of a known frame, because it changes answers
    and figures."""
    known = base.frame or Frame()
    frame = replace(known, bos=known.bos if bos is None else bos)
    if no_system or system is not None:
        frame = replace(frame, system_prompt=None if no_system else system)
    for name in ("bos", "system_prompt"):
        if base.frame and getattr(frame, name) != getattr(known, name):
            print(f"{base.path}: trained with {name} = {getattr(known, name)!r}, asked with "
                  f"{getattr(frame, name)!r}", file=sys.stderr)  # fmt: skip
    for note in (*base.notes, *base.frame_notes(frame)):
        print(f"{base.path}: note: {note}", file=sys.stderr)
    return frame


def place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What `--device` and `--dtype` mean on this machine."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    cuda = device != "cpu" and torch.cuda.is_available()
    if dtype == "auto":
        dtype = "bfloat16" if cuda else "float32"
    return torch.device("cuda" if cuda else "cpu"), getattr(torch, dtype)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m notus.generate",
        description="Answer a prompt, or chat in the terminal: /reset forgets, /exit or Ctrl-D ends.",
        parents=[model_arguments()],
        epilog="Without --prompt it answers what is piped in, or chats where nothing is.",
    )
    # The defaults are what Notus-7B-v1 was evaluated with on AlpacaEval.
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint in Hugging Face layout")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    parser.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="0: always the likeliest token (default: 0.7)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens of this share (default: 1)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=2048, metavar="N", help="of one answer (default: 2048)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same answer (default: 0)")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.temperature < float("inf"):
        parser.error(f"--temperature {arguments.temperature}: must be 0 or more")
    if not 0 < arguments.top_p <= 1:
        parser.error(f"--top-p {arguments.top_p}: must be above 0 and at most 1")
    if arguments.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {arguments.max_new_tokens}: must be 1 or more")

    try:
        prompt = arguments.prompt
        if prompt is None and not sys.stdin.isatty():
            prompt = sys.stdin.read().rstrip("\n")
        if prompt is not None and not prompt.strip():
            raise ValueError("the prompt is empty: give --prompt TEXT, pipe a text in, or run in a terminal to chat")
        base = read_base(arguments.model)
        encoder = base.encoder(choose_frame(base, arguments.bos, arguments.system, arguments.no_system))
        asked: list[Message] = [{"role": "user", "content": prompt or "Hi"}]
        encoder.prompt(asked)  # what cannot be asked is refused before weights are read
        model = load_model(base, *place(arguments.device, arguments.dtype))

        def reply(messages: list[Message]) -> Iterator[str]:
            steps = stream(
                model, [encoder.prompt(messages)], arguments.max_new_tokens, base.stop_ids, arguments.temperature,
                arguments.top_p, arguments.seed,
            )  # fmt: skip
            return text_stream((step[0] for step in steps), base.tokenizer)

        if prompt is None:
            chat(reply)
        else:
            for piece in reply(asked):
                print(piece, end="", flush=True)
            print()
    except (ValueError, OSError) as error:
        print(f"notus.generate: error: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
