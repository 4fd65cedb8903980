"""`score_mode: true` in the body of a completion request."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers import TOLERANCE, random_prompts, token_logprobs

IDS = [5, 6, 7, 300, 301, 302]
CLOSE = {"atol": TOLERANCE}


def only(answer: Any) -> Any:
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    return choice


def test_own_tokens(complete: Any, reference: Any) -> None:
    answer = complete(prompt=IDS, score_mode=True)
    choice = only(answer)
    assert choice["text"] == "" and choice["logprobs"] is None
    assert choice["prompt_logprobs"] is None
    scores = choice["scores"]
    assert set(scores) == {"start", "token_ids", "logprobs", "statistics"}
    assert (scores["start"], scores["token_ids"], scores["statistics"]) == (1, IDS[1:], {})
    want = token_logprobs(reference("llama", IDS), IDS)
    np.testing.assert_allclose(scores["logprobs"], want, **CLOSE)
    assert answer["usage"]["prompt_tokens"] == len(IDS)


def test_targets_statistics_temperature_and_alternatives(complete: Any, reference: Any) -> None:
    targets = [[10, 11], [12, 13]]
    choice = only(
        complete(
            prompt=IDS,
            score_mode=True,
            target_token_ids=targets,
            score_statistics=["argmax", "entropy"],
            score_temperature=2.0,
            prompt_logprobs=3,
        )
    )
    scores = choice["scores"]
    logits = reference("llama", IDS)[-3:-1] / 2
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert scores["start"] == 4 and scores["token_ids"] == targets
    np.testing.assert_allclose(
        scores["logprobs"], np.take_along_axis(want, np.array(targets), 1), **CLOSE
    )
    assert scores["statistics"]["argmax"] == want.argmax(-1).tolist()
    entropy = -(np.exp(want) * want).sum(-1)
    np.testing.assert_allclose(scores["statistics"]["entropy"], entropy, atol=1e-4)
    best = np.argsort(-want)[:, :3]
    assert scores["top_token_ids"] == best.tolist()
    np.testing.assert_allclose(scores["top_logprobs"], np.take_along_axis(want, best, 1), **CLOSE)
    # The stock field, as it was asked for: nothing where nothing was scored.
    assert choice["prompt_logprobs"][:4] == [None] * 4
    for row, entries, named, top in zip(
        want, choice["prompt_logprobs"][4:], targets, best, strict=True
    ):
        assert set(entries) == {str(t) for t in [*named, *top]}
        for token, entry in entries.items():
            assert entry["logprob"] == pytest.approx(row[int(token)], abs=TOLERANCE)


def test_top_p(complete: Any, reference: Any) -> None:
    """The likeliest token alone is kept: its probability is 1, any other's 0 (-9999 in JSON)."""
    rows = reference("llama", IDS)[-2:-1]
    best, worst = int(rows[0].argmax()), int(rows[0].argmin())
    scores = only(
        complete(
            prompt=IDS,
            score_mode=True,
            target_token_ids=[[best, worst]],
            score_top_p=1e-6,
            score_statistics=["model_logprob", "head_mass", "entropy"],
        )
    )["scores"]
    assert scores["logprobs"] == [[0.0, -9999.0]]
    assert scores["statistics"]["model_logprob"] == pytest.approx([rows[0, best]], abs=TOLERANCE)
    assert scores["statistics"]["head_mass"] == pytest.approx(
        [np.exp(rows[0, best])], abs=TOLERANCE
    )
    assert scores["statistics"]["entropy"] == pytest.approx([0.0], abs=1e-6)


def test_a_list_of_prompts_has_a_list_of_targets(complete: Any, reference: Any) -> None:
    prompts = [IDS, IDS[:3], IDS[:4]]
    targets = [[20, 21], None, [[22, 23, 24]]]
    answer = complete(prompt=prompts, score_mode=True, target_token_ids=targets)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    for ids, target, choice in zip(prompts, targets, answer["choices"], strict=True):
        rows = np.array(ids[1:] if target is None else target)
        want = reference("llama", ids)[:-1][-len(rows) :]
        want = np.take_along_axis(want, rows.reshape(len(rows), -1), 1).reshape(rows.shape)
        np.testing.assert_allclose(choice["scores"]["logprobs"], want, **CLOSE)


def test_texts_with_echo_and_logprobs(complete: Any) -> None:
    texts = ["class Reader:", "def write(self):"]
    asked = {"prompt": texts, "echo": True, "logprobs": 2}
    ours = complete(**asked, score_mode=True)
    stock = complete(**asked, max_tokens=0, prompt_logprobs=2)
    for choice, expected in zip(ours["choices"], stock["choices"], strict=True):
        assert choice["text"] == expected["text"]
        found, wanted = choice["logprobs"], expected["logprobs"]
        assert found["tokens"] == wanted["tokens"]
        assert found["text_offset"] == wanted["text_offset"]
        assert [set(t or ()) for t in found["top_logprobs"]] == [
            set(t or ()) for t in wanted["top_logprobs"]
        ]
        np.testing.assert_allclose(
            found["token_logprobs"][1:], wanted["token_logprobs"][1:], **CLOSE
        )
        assert choice["scores"]["logprobs"] == found["token_logprobs"][1:]
        assert choice["scores"]["statistics"] == {}
        ranks = [[e["rank"] for e in row.values()] for row in choice["prompt_logprobs"][1:]]
        assert ranks == [[e["rank"] for e in r.values()] for r in expected["prompt_logprobs"][1:]]


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_has_the_scores_of_each_prompt(complete: Any, events: Any, echo: bool) -> None:
    body = {"prompt": [IDS, IDS[:3]], "score_mode": True, "score_statistics": ["rank"]}
    *chunks, last = events(**body, echo=echo, stream_options={"include_usage": True})
    whole = complete(**body, echo=echo)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 0
    assert last["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    found = sorted((c for e in chunks for c in e["choices"]), key=lambda c: c["index"])
    for chunk, choice in zip(found, whole["choices"], strict=True):
        np.testing.assert_allclose(
            chunk["scores"].pop("logprobs"), choice["scores"].pop("logprobs"), **CLOSE
        )
        assert chunk["scores"] == choice["scores"]
        assert (chunk["text"], chunk["finish_reason"]) == (choice["text"], "length")
        assert ("prompt_token_ids" in chunk) == echo  # as stock sends it


def test_the_prefix_cache_serves_what_no_score_needs(complete: Any, reference: Any) -> None:
    (context,) = random_prompts([500], 1024, seed=50)
    for number, answers in enumerate(([10, 11, 12, 13], [14, 15, 16, 17])):
        ids = [*context, 4]
        answer = complete(prompt=ids, score_mode=True, target_token_ids=[answers])
        cached = answer["usage"]["prompt_tokens_details"]
        # 499 tokens of the context may come from the cache, in blocks of 32.
        assert (cached or {}).get("cached_tokens", 0) == (480 if number else 0)
        want = reference("llama", ids)[-2, answers]
        np.testing.assert_allclose(only(answer)["scores"]["logprobs"], [want], **CLOSE)


def test_the_openai_client(server: str, complete: Any) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    answer = client.completions.create(
        model="model", prompt=IDS, extra_body={"score_mode": True, "target_token_ids": [9]}
    )
    expected = only(complete(prompt=IDS, score_mode=True, target_token_ids=[9]))
    assert answer.choices[0].scores == expected["scores"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score_mode": "yes"}, "score_mode must be True or False, got 'yes'"),
        ({"score_mode": False, "target_token_ids": [4]}, "target_token_ids needs score_mode=true"),
        ({"score_mode": None, "score_temperature": 2}, "score_temperature needs score_mode=true"),
        ({"target_token_ids": []}, "target_token_ids is empty"),
        ({"target_token_ids": [1024]}, "target_token_ids[0] is 1024, outside the vocabulary"),
        ({"target_token_ids": [4.5]}, "must be integers, got 4.5"),
        ({"target_token_ids": {"4": 4}}, "must be a list of token ids"),
        ({"target_token_ids": [4] * 6}, "has 6 rows"),
        ({"target_token_ids": [[4] * 21]}, "max_logprobs=20"),
        ({"prompt": [IDS, IDS], "target_token_ids": [4]}, "one entry for each of the 2 prompts"),
        ({"prompt": [IDS, IDS], "target_token_ids": 4}, "one entry for each of the 2 prompts"),
        ({"target_token_ids": [4], "truncate_prompt_tokens": 2}, "would shift target_token_ids"),
        ({"prompt_logprobs": -1}, "max_logprobs=20"),
        ({"prompt_logprobs": 21}, "max_logprobs=20"),
        ({"score_statistics": ["ranks"]}, "did you mean 'rank'?"),
        (
            {"score_statistics": "rank"},
            "score_statistics must be a list, each entry a text, got 'rank'",
        ),
        ({"score_temperature": "hot"}, "score_temperature must be a number"),
        ({"score_top_p": 0}, "score_top_p must be a number above 0 and of at most 1, got 0"),
        ({"score_top_p": True}, "score_top_p must be a number above 0 and of at most 1, got True"),
        ({"score_temperature": 0}, "score_temperature must be a number"),
        ({"score_temperature": 1e-300}, "score_temperature must be a number"),
        ({"logprobs": 1}, "or set echo=true"),
        ({"logprobs": 1, "echo": True, "target_token_ids": [4]}, "leave out logprobs"),
        ({"logprobs": -1, "echo": True}, "set prompt_logprobs=-1"),
        ({"n": 2}, "n=2 cannot be combined"),
        ({"stop": ["a"]}, "stop=['a'] cannot be combined"),
        ({"prompt_embeds": "AAAA"}, "score embeddings with LLM or AsyncLLM"),
        ({"use_beam_search": True}, "use_beam_search cannot be combined"),
        ({"stream": True, "target_token_ids": [-1]}, "target_token_ids[0] is -1"),
        ({"stream": True, "prompt": [5000]}, "prompt_token_ids[0] is 5000"),
        ({"prompt": [[]]}, "the prompt has no token"),
    ],
    ids=str,
)
def test_bad_fields_are_named(refused: Any, fields: dict[str, Any], message: str) -> None:
    assert message in refused(**{"prompt": IDS, "score_mode": True, **fields})
