"""Training: gradients, determinism, and that something is learned."""

from __future__ import annotations

import dataclasses
import math
from contextlib import closing

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm.score.errors import ScoreModeError
from vllm.score.tiny.embedded import Phase, Recipe, held_out_nats, train, unigram_perplexity
from vllm.score.tiny.training import Replicas

SMALL = Recipe(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_layers=1,
    phases=(Phase(16, 8, 30), Phase(48, 3, 8)),
)


def _markov(n: int, seed: int) -> np.ndarray:
    """Tokens that mostly follow one another: predictable from context, hardly without."""
    order = np.random.default_rng(seed)
    tokens = [0]
    for _ in range(n - 1):
        jump = order.random() < 0.2
        tokens.append(int(order.integers(300)) if jump else (tokens[-1] * 7 + 3) % 300)
    return np.array(tokens, dtype=np.int64)


def _llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_replicas_give_the_gradient_of_the_mean_loss(sequences: int) -> None:
    batch = torch.randint(0, 50, (sequences, 9), generator=torch.Generator().manual_seed(1))
    reference = _llama()
    # Hugging Face's own loss, on the same rows: mean over all targets.
    expected = reference(batch, labels=batch).loss
    expected.backward()
    model = _llama()
    with closing(Replicas(model, 2)) as replicas:
        loss = replicas.backward(batch, batch)
        replicas.backward(batch, batch)  # adds up, as autograd's own gradients do
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for weight, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, 2 * other.grad, rtol=1e-4, atol=1e-7)


def test_the_same_weights_whatever_the_number_of_threads() -> None:
    tokens = _markov(3000, seed=0)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            # Not torch.set_num_threads: a CPU engine in this process switches that one off.
            torch._C.set_num_threads(count)
            torch.manual_seed(count)  # the caller's seed has no say either
            results.append(train(tokens, SMALL, bos=0, eos=1, progress=False))
            assert torch.get_num_threads() == count
    finally:
        torch._C.set_num_threads(threads)
    (first, first_loss), (second, second_loss) = results
    assert first_loss == second_loss
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    other, _ = train(tokens, dataclasses.replace(SMALL, seed=1), bos=0, eos=1, progress=False)
    assert not torch.equal(other.lm_head.weight, first.lm_head.weight)


def test_what_is_learned_beats_the_unigram_figure_on_other_text() -> None:
    recipe = dataclasses.replace(SMALL, phases=(Phase(32, 8, 250),), learning_rate=1e-2)
    tokens, held_out = _markov(20_000, seed=0), _markov(1_000, seed=1)
    model, loss = train(tokens, recipe, bos=0, eos=1, progress=False)
    nats, scored = held_out_nats(model, held_out, window=100)
    assert scored == 10 * 99
    unigram = unigram_perplexity(held_out[1:], np.bincount(tokens, minlength=300))
    assert unigram > 200
    assert math.exp(nats / scored) < unigram / 5
    assert math.exp(loss) < unigram / 5


def test_held_out_nats_against_a_loop_of_one_token_at_a_time() -> None:
    model = _llama().eval()
    tokens = np.random.default_rng(0).integers(0, 50, 23).astype(np.int64)
    expected = 0.0
    for start in (0, 10):  # the window that starts at 20 is scored too, below
        for i in range(start + 1, start + 10):
            with torch.no_grad():
                logits = model(torch.from_numpy(tokens[start:i])[None]).logits[0, -1].double()
            expected -= float(logits.log_softmax(-1)[tokens[i]])
    for i in (21, 22):
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens[20:i])[None]).logits[0, -1].double()
        expected -= float(logits.log_softmax(-1)[tokens[i]])
    nats, scored = held_out_nats(model, tokens, window=10)
    assert scored == 20
    assert nats == pytest.approx(expected, rel=1e-6)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ScoreModeError, match=r"has 96 tokens; sequences of 48 need at least 97"):
        train(_markov(96, seed=0), SMALL, bos=0, eos=1, progress=False)


def test_a_loss_that_is_no_number_is_an_error() -> None:
    recipe = dataclasses.replace(SMALL, learning_rate=1e30, phases=(Phase(16, 8, 20),))
    with pytest.raises(ScoreModeError, match=r"lower learning_rate, which is 1e\+30"):
        train(_markov(500, seed=0), recipe, bos=0, eos=1, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 10}, "vocab_size must be .* of at least 258, got 10"),
        ({"hidden_size": 100}, "hidden_size is 100; .*multiple of head_dim"),
        ({"phases": ()}, "phases is empty"),
        ({"phases": (Phase(16, 0, 1),)}, "its numbers must be 1 or more"),
        ({"phases": (Phase(4096, 1, 1),)}, "at most max_position_embeddings, 2048"),
        ({"warmup_fraction": 1.0}, "warmup_fraction must be .* below 1, got 1.0"),
    ],
)
def test_recipes_that_cannot_be_followed_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ScoreModeError, match=message):
        dataclasses.replace(SMALL, **change)


def test_the_key_changes_with_every_field() -> None:
    changes = {
        "vocab_size": 301,
        "hidden_size": 96,
        "intermediate_size": 97,
        "num_layers": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "phases": (Phase(16, 8, 31), Phase(48, 3, 8)),
        "learning_rate": 1e-3,
        "embedding_rate_factor": 1.0,
        "warmup_fraction": 0.2,
        "weight_decay": 0.0,
        "init_std": 0.1,
        "held_out_fraction": 0.2,
        "minimum_bytes": 1,
        "seed": 1,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(Recipe)}
    keys = {dataclasses.replace(SMALL, **{name: value}).key() for name, value in changes.items()}
    assert len(keys | {SMALL.key()}) == len(changes) + 1
    assert SMALL.key() == dataclasses.replace(SMALL).key()
