"""A mixed load for a completion server: what is sent, and what a right answer is.

Nothing here imports vLLM: a client does not.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

# float64 log-softmax [n, V] of a prompt
Reference = Callable[[list[int]], np.ndarray]

TOLERANCE = 1e-4
LOST = -1
# Of ten requests; "hang up" and "invalid" besides.
MIX = (
    "echo",
    "echo and a token",
    "score",
    "candidates",
    "generation",
    "batch",
    "score stream",
    "echo stream",
    "hang up",
    "invalid",
)
# Fields that spoil a score request, and what the refusal must name.
INVALID: tuple[tuple[dict[str, Any], str], ...] = (
    ({"target_token_ids": []}, "target_token_ids is empty"),
    ({"target_token_ids": [10**9]}, "outside the vocabulary"),
    ({"target_token_ids": "words"}, "target_token_ids must be a list"),
    ({"target_token_ids": [[1, 2], [3]]}, "same number of candidates"),
    ({"score_statistics": ["entropie"]}, "did you mean 'entropy'?"),
    ({"score_temperature": 0}, "score_temperature must be"),
    ({"n": 2}, "n=2"),
    ({"logprobs": 1}, "logprobs=1"),
    ({"stream": True, "prompt": [10**9]}, "outside the vocabulary"),
    ({"prompt_logprobs": 1000}, "max_logprobs=20"),
    ({"score_mode": "yes"}, "score_mode must be True or False"),
)


@dataclass
class Request:
    """One request of the load.

    Attributes:
        kind: of `MIX`.
        body: what is posted.
        hang_up_after: seconds after which the client is gone.
        error: what the message of the refusal holds.
    """

    kind: str
    body: dict[str, Any]
    hang_up_after: float | None = None
    error: str | None = None


@dataclass
class Answer:
    """What came back.

    Attributes:
        status: of HTTP; 0 when the client hung up, LOST when the connection broke.
        events: the JSON of the answer, or of every event of a stream.
        seconds: until all of it was there.
    """

    status: int
    events: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def make_requests(count: int, vocab_size: int, longest: int, seed: int = 0) -> list[Request]:
    """`count` requests of all kinds in random order, prompts of 1 to `longest` random tokens."""
    rng = np.random.default_rng(seed)

    def prompt(low: int = 2, high: int = longest) -> list[int]:
        length = int(np.exp(rng.uniform(np.log(low), np.log(high))))
        return [int(x) for x in rng.integers(4, vocab_size, length)]

    kinds = [MIX[i % len(MIX)] for i in range(count)]
    rng.shuffle(kinds)
    return [_request(kind, i, prompt, rng, vocab_size) for i, kind in enumerate(kinds)]


def _request(kind: str, number: int, prompt: Any, rng: Any, vocab_size: int) -> Request:
    score: dict[str, Any] = {"score_mode": True}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    greedy = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
    echo = {"echo": True, "max_tokens": 0, "logprobs": int(rng.integers(0, 4))}
    candidates = rng.integers(4, vocab_size, (1, 4)).tolist()
    if kind == "echo":
        return Request(kind, {"prompt": prompt(1), **echo})
    if kind == "echo and a token":
        token = {"echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 0, "seed": 1234}
        return Request(kind, {"prompt": prompt(), **token})
    if kind == "score":
        return Request(kind, {"prompt": prompt(), **score, "score_statistics": ["entropy", "rank"]})
    if kind == "candidates":
        return Request(kind, {"prompt": prompt(), **score, "target_token_ids": candidates})
    if kind == "generation":
        return Request(kind, {"prompt": prompt(), **greedy})
    if kind == "batch":
        prompts = [prompt(2, 200) for _ in range(3)]
        targets = [prompts[0][-1:], candidates, None]
        return Request(kind, {"prompt": prompts, **score, "target_token_ids": targets})
    if kind == "score stream":
        return Request(kind, {"prompt": [prompt(), prompt(2, 100)], **score, **stream})
    if kind == "echo stream":
        return Request(kind, {"prompt": prompt(), **echo, **stream})
    if kind == "hang up":
        work = score if number % 2 else {**greedy, "max_tokens": 400}
        patience = float(rng.uniform(0.02, 2 if number % 2 else 0.3))
        return Request(kind, {"prompt": prompt(200), **work}, hang_up_after=patience)
    fields, error = INVALID[number % len(INVALID)]
    return Request(kind, {"prompt": prompt(8, 100), **score, **fields}, error=error)


async def send(client: httpx.AsyncClient, request: Request) -> Answer:
    """Post one request and read the whole answer, or hang up."""
    begin = time.perf_counter()
    try:
        async with asyncio.timeout(request.hang_up_after):
            response = await client.post("/v1/completions", json={"model": "model", **request.body})
    except TimeoutError:
        return Answer(0, seconds=time.perf_counter() - begin)
    except httpx.HTTPError as error:
        return Answer(LOST, [{"error": {"message": repr(error)}}], time.perf_counter() - begin)
    text = response.text
    if request.body.get("stream") and response.status_code == 200:
        lines = [x.removeprefix("data: ") for x in text.splitlines() if x.startswith("data: ")]
        if lines[-1:] != ["[DONE]"]:
            raise ValueError(f"the stream does not end with [DONE]: {text[-200:]}")
        events = [json.loads(x) for x in lines[:-1]]
    else:
        events = [json.loads(text)]
    return Answer(response.status_code, events, time.perf_counter() - begin)


def problem(request: Request, answer: Answer, reference: Reference) -> str | None:
    """What is wrong with an answer; None when it is right."""
    if answer.status == 0 and request.hang_up_after is not None:
        return None
    if request.error is not None:
        message = str(answer.events[0].get("error", {}).get("message"))
        right = answer.status == 400 and request.error in message
        return (
            None if right else f"status {answer.status}, expected 400 {request.error!r}: {message}"
        )
    if answer.status != 200:
        return f"status {answer.status}: {answer.events}"
    try:
        _check_answer(request, answer, reference)
    except AssertionError as error:
        return str(error) or repr(error)
    return None


def _check_answer(request: Request, answer: Answer, reference: Reference) -> None:
    body = request.body
    prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
    choices = sorted((c for e in answer.events for c in e["choices"]), key=lambda c: c["index"])
    assert [c["index"] for c in choices] == list(range(len(prompts))), "a choice a prompt"
    usage = answer.events[-1]["usage"]
    generated = 0
    targets = body.get("target_token_ids") or [None] * len(prompts)
    for ids, target, choice in zip(prompts, targets, choices, strict=False):
        want = reference(ids)
        assert choice["finish_reason"] == "length", choice["finish_reason"]
        if body.get("score_mode"):
            whole = targets if request.kind == "candidates" else target
            _check_scores(choice, ids, whole, want, body.get("score_statistics", ()))
        elif body.get("echo"):
            generated += _check_echo(choice, ids, want, body)
        else:
            generated += _check_greedy(ids, choice["token_ids"], reference)
    assert usage["prompt_tokens"] == sum(map(len, prompts)), usage
    assert usage["completion_tokens"] == generated, usage


def _check_scores(choice: Any, ids: list[int], target: Any, want: np.ndarray, names: Any) -> None:
    scores = choice["scores"]
    rows = np.asarray(ids[1:] if target is None else target)
    context = want[:-1][len(ids) - 1 - len(rows) :]
    assert choice["text"] == "" and scores["start"] == len(ids) - len(rows), scores["start"]
    assert scores["token_ids"] == rows.tolist(), "token_ids"
    expected = np.take_along_axis(context, rows.reshape(len(rows), -1), axis=1)
    close(np.asarray(scores["logprobs"]).reshape(expected.shape), expected)
    assert set(scores["statistics"]) == set(names), scores["statistics"].keys()
    if "entropy" in names:
        close(scores["statistics"]["entropy"], -(np.exp(context) * context).sum(-1))
    if "rank" in names:
        # Equal to rounding: tokens nearer than that may stand on either side.
        low = (context > expected + TOLERANCE).sum(-1) + 1
        high = (context > expected - TOLERANCE).sum(-1) + 1
        rank = np.asarray(scores["statistics"]["rank"])
        assert ((low <= rank) & (rank <= high)).all(), "rank"


def _check_echo(choice: Any, ids: list[int], want: np.ndarray, body: dict[str, Any]) -> int:
    """The number of tokens that were generated beside the echo."""
    logprobs = choice["logprobs"]
    found, tops = logprobs["token_logprobs"], logprobs["top_logprobs"]
    assert len(found) == len(tops) == len(logprobs["tokens"]) == len(ids) + body["max_tokens"]
    assert found[0] is None and tops[0] is None
    own = want[np.arange(len(ids) - 1), ids[1:]]
    close(found[1 : len(ids)], own)
    if body["max_tokens"]:
        close(found[-1:], want[-1:].max(-1))
    # By id: the keys of top_logprobs are texts, of which several tokens may share one.
    for row, by_id in zip(want, choice.get("prompt_logprobs", [])[1:], strict=False):
        top = sorted(e["logprob"] for e in by_id.values() if e["rank"] <= body["logprobs"])
        close(top, np.sort(row)[len(row) - len(top) :])
        assert len(top) == body["logprobs"], f"{len(top)} alternatives"
    return int(body["max_tokens"])


def _check_greedy(ids: list[int], tokens: list[int], reference: Reference) -> int:
    """The number of generated tokens, each the likeliest one to rounding."""
    rows = reference(ids + tokens)[len(ids) - 1 : -1]
    chosen = rows[np.arange(len(tokens)), tokens]
    assert len(tokens) > 0 and (chosen >= rows.max(-1) - TOLERANCE).all(), "not greedy"
    return len(tokens)


def close(found: Any, expected: np.ndarray) -> None:
    """Raise AssertionError unless two arrays agree."""
    found = np.asarray(found, dtype=np.float64)
    assert found.shape == expected.shape, f"shape {found.shape}, not {expected.shape}"
    largest = float(np.abs(found - expected).max(initial=0.0))
    assert largest <= TOLERANCE, f"{largest:.1e} nats from the reference"
