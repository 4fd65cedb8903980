"""The embedded default: a small trained model, made once and kept in the user's cache."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vllm.score.tiny.baselines import count_tokens, uniform_perplexity, unigram_perplexity
from vllm.score.tiny.cached import MODEL_FILES, default_cache_dir, make_once
from vllm.score.tiny.corpus import Corpus, standard_library_corpus
from vllm.score.tiny.recipe import Recipe

__all__ = ["EmbeddedModel", "default_cache_dir", "embedded_model"]

_MODEL, _HELD_OUT, _COUNTS = "model", "held_out.txt", "train_counts.npy"
_FACTS, _RECIPE = "facts.json", "recipe.json"


@dataclass(frozen=True)
class EmbeddedModel:
    """A model made on this machine.

    Attributes:
        directory: the model and its tokenizer, as Hugging Face and vLLM load them; float32, in
            which it was trained: at this size the file is small, and scores can be compared
            with a float64 reference without the rounding of bf16 weights in between.
        held_out_text: UTF-8 file of text that training never saw.
        train_counts: int64 [V], how often each token occurs in the training text.
        facts: how it was made and what came out, as in `facts.json`.
    """

    directory: Path
    held_out_text: Path
    train_counts: np.ndarray
    facts: Mapping[str, Any]

    def uniform_perplexity(self) -> float:
        """Perplexity of a uniform guess over the vocabulary."""
        return uniform_perplexity(len(self.train_counts))

    def unigram_perplexity(self, token_ids: Sequence[int] | np.ndarray) -> float:
        """Perplexity of the tokens under their frequencies in the training text.

        See `vllm.score.tiny.baselines.unigram_perplexity` for the formula and the errors.
        """
        return unigram_perplexity(token_ids, self.train_counts)


def embedded_model(
    cache_dir: Path | None = None, progress: bool = True, *, recipe: Recipe | None = None
) -> EmbeddedModel:
    """The embedded model; made on the first call (about a minute on 2 cores), then read.

    In the cache it is there whole or not at all, whoever else makes it (`vllm.score.tiny.cached`).
    A changed recipe, or another Python release (other text), makes another model.

    Args:
        cache_dir: by default what the environment variable VLLM_SCORE_CACHE names, else the
            user's cache directory (on Linux XDG_CACHE_HOME, or ~/.cache).
        progress: whether to say on standard error that the model is being made, with a bar.
        recipe: another recipe than the default, as tests use.

    Raises:
        ScoreModeError: where the cache cannot be written, or this Python lacks the sources of
            its standard library.
    """
    recipe = recipe or Recipe()
    target = Path(cache_dir or default_cache_dir()) / "embedded" / recipe.key()
    make_once(
        target,
        "the embedded model",
        files=(*(f"{_MODEL}/{file}" for file in MODEL_FILES), _HELD_OUT, _COUNTS, _FACTS),
        build=partial(_build, recipe=recipe, progress=progress),
        begins="Making the embedded model from the docstrings of Python's standard library "
        "(once; about a minute on 2 cores)",
        progress=progress,
    )
    return EmbeddedModel(
        directory=target / _MODEL,
        held_out_text=target / _HELD_OUT,
        train_counts=np.load(target / _COUNTS),
        facts=json.loads((target / _FACTS).read_text()),
    )


def _build(folder: Path, recipe: Recipe, progress: bool) -> None:
    started = time.perf_counter()
    import torch
    import transformers

    from vllm.score.tiny.saving import save_model
    from vllm.score.tiny.tokenizer import train_tokenizer
    from vllm.score.tiny.training import held_out_nats, train

    corpus = standard_library_corpus(
        held_out_fraction=recipe.held_out_fraction, minimum_bytes=recipe.minimum_bytes
    )
    tokenizer = train_tokenizer([d.text for d in corpus.train], recipe.vocab_size)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream: list[int] = []
    for document in corpus.train:
        stream += [bos, *tokenizer.encode(document.text), eos]
    train_ids = np.array(stream, dtype=np.int64)
    counts = count_tokens(train_ids, recipe.vocab_size)

    model, loss = train(train_ids, recipe, bos=bos, eos=eos, progress=progress)

    held_out = "\n".join(document.text for document in corpus.held_out)
    held_out_ids = np.array(tokenizer.encode(held_out), dtype=np.int64)
    window = recipe.max_position_embeddings
    nats, scored = held_out_nats(model, held_out_ids, window)
    save_model(model, tokenizer, folder / _MODEL)
    (folder / _HELD_OUT).write_bytes(held_out.encode())
    np.save(folder / _COUNTS, counts)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_text": _text_facts(corpus, len(train_ids)),
        "training_steps": recipe.steps,
        "training_tokens_seen": recipe.tokens,
        "training_loss_nats": loss,
        "held_out_bytes": len(held_out.encode()),
        "held_out_tokens": len(held_out_ids),
        "held_out_window": window,
        "held_out_perplexity": math.exp(nats / scored),
        "held_out_unigram_perplexity": unigram_perplexity(held_out_ids[1:], counts),
        "uniform_perplexity": uniform_perplexity(recipe.vocab_size),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (folder / _RECIPE).write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n")


def _text_facts(corpus: Corpus, tokens: int) -> dict[str, Any]:
    return {
        "source": "docstrings of Python's standard library",
        "bytes": corpus.train_bytes,
        "files": len(corpus.train),
        "tokens": tokens,
        "corpus_sha256": corpus.sha256(),
        "held_out_packages": sorted({document.package for document in corpus.held_out}),
    }
