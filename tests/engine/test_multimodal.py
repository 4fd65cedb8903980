"""Prompts with images: the text behind them, against Hugging Face in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import SMALL_CACHE
from tests.helpers import random_prompts, token_logprobs, with_bos
from tests.support.multimodal import IMAGE_SIZE, VOCABULARY, make_gemma3, make_idefics3
from vllm.score import ScoreModeError, score

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4  # nats
LONG = "A text of some length, which is more than one block of the cache has room for. " * 6
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "gpu_memory_utilization": 0.3,
    **SMALL_CACHE,
    "distributed_executor_backend": "uni",
    "max_model_len": 512,
    "max_num_seqs": 16,
}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One that puts a BOS in front of a text, as Gemma's and Llama's do."""
    import email
    from pathlib import Path

    from vllm.score.tiny.corpus import read_documents, train_tokenizer

    documents = read_documents(Path(email.__file__).parent)
    return with_bos(train_tokenizer([document.text for document in documents], 512))


class Reference:
    """A model of Hugging Face in float64, with its processor."""

    def __init__(self, folder: Any) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder)
        loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
        self.model = loaded.eval()

    def of_ids(self, ids: list[int]) -> np.ndarray:
        """Float64 [n, V]."""
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids])).logits
        return logits[0].log_softmax(-1).numpy()

    def of_images(self, text: str, images: list[Any]) -> tuple[list[int], np.ndarray]:
        """The ids of the prompt [n], placeholders included, and float64 [n, V]."""
        inputs = self.processor(text=text, images=images, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].double()
        with torch.no_grad():
            logits = self.model(**inputs).logits
        return inputs["input_ids"][0].tolist(), logits[0].log_softmax(-1).numpy()


@pytest.fixture(scope="session")
def idefics(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Reference]:
    """An engine whose steps are of 96 positions, and its reference."""
    from vllm import LLM

    folder = make_idefics3(tmp_path_factory.mktemp("idefics3"), tokenizer)
    try:
        reference = Reference(folder)
    except ValueError as error:  # transformers 5.17, beside vLLM 0.31
        if "torchvision" not in str(error):
            raise
        pytest.skip("this transformers loads no image processor without torchvision")
    return LLM(str(folder), max_num_batched_tokens=96, **SETTINGS), reference


@pytest.fixture(scope="session")
def gemma(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """An engine of vLLM's Transformers backend, and (ids, float64 [n, V]) of prompts of text.

    The backend changes Hugging Face's class of the model in this process: no reference after it.
    """
    from vllm import LLM

    folder = make_gemma3(tmp_path_factory.mktemp("gemma3"), tokenizer)
    reference = Reference(folder)
    prompts = random_prompts([2, 30, 200], 500, seed=1)
    expected = [(ids, reference.of_ids(ids)) for ids in prompts]
    settings = {**SETTINGS, "model_impl": "transformers", "max_num_batched_tokens": 512}
    return LLM(str(folder), **settings), expected


def image(seed: int) -> Any:
    from PIL import Image

    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8))


def prompt_with(text: str, *seeds: int) -> dict[str, Any]:
    return {"prompt": text, "multi_modal_data": {"image": [image(seed) for seed in seeds]}}


def score_params(**options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(score_mode=True, **options)


def own(ids: list[int], rows: np.ndarray, start: int) -> np.ndarray:
    """Log-probabilities of the tokens from position `start` on."""
    return token_logprobs(rows, ids)[start - 1 :]


def test_the_text_behind_an_image(idefics):
    llm, reference = idefics
    seeds = (1, 2, 1)
    texts = [f"Before it <image>{LONG}", f"Before it <image>{LONG}", f"<image>and<image>{LONG}"]
    shown = [(1,), (2,), seeds[:2]]
    requests = [prompt_with(t, *s) for t, s in zip(texts, shown, strict=True)]
    scores = score(llm, [*requests, "no image"], statistics=["entropy"], use_tqdm=False)
    expected = [
        reference.of_images(t, [image(seed) for seed in s])
        for t, s in zip(texts, shown, strict=True)
    ]
    for found, (ids, rows) in zip(scores, expected, strict=False):
        last = max(
            i for i, token in enumerate(ids) if token == reference.model.config.image_token_id
        )
        assert found.start == last + 2  # the processor writes a token behind the image
        assert found.start + len(found) == len(ids)
        np.testing.assert_allclose(found.logprobs, own(ids, rows, found.start), atol=TOLERANCE)
        entropy = -(np.exp(rows) * rows).sum(1)[found.start - 1 : -1]
        np.testing.assert_allclose(found.statistics["entropy"], entropy, atol=TOLERANCE)
        assert f"from position {found.start} on" in found.notes[0]
    assert np.abs(scores[0].logprobs - scores[1].logprobs).max() > 0.1  # the images count
    plain = reference.processor.tokenizer("no image")["input_ids"]
    np.testing.assert_allclose(
        scores[3].logprobs, own(plain, reference.of_ids(plain), 1), atol=TOLERANCE
    )


def test_targets_candidates_and_stock_form(idefics):
    llm, reference = idefics
    text = "See <image>: it is round."
    ids, rows = reference.of_images(text, [image(3)])
    targets = [[7, 8, 9], [10, 11, 12]]
    prompt = {**prompt_with(text, 3), "target_token_ids": targets}
    (found,) = score(llm, [prompt], use_tqdm=False)
    (output,) = llm.generate([prompt], score_params(), use_tqdm=False)
    expected = np.take_along_axis(rows[-3:-1], np.array(targets), axis=1)
    for scores in (found, output.scores):
        assert scores.start == len(ids) - 2
        np.testing.assert_allclose(scores.logprobs, expected, atol=TOLERANCE)
    assert output.prompt_token_ids == ids
    (output,) = llm.generate([prompt_with(text, 3)], score_params(), use_tqdm=False)
    start = output.scores.start  # the whole vocabulary, where nothing else is asked for
    np.testing.assert_allclose(output.scores.logprobs, rows[start - 1 : -1], atol=TOLERANCE)
    assert output.prompt_logprobs[start - 1] is None
    value = output.prompt_logprobs[start][ids[start]].logprob
    assert value == pytest.approx(rows[start - 1, ids[start]], abs=TOLERANCE)


def test_the_cache_knows_the_images(idefics):
    llm, reference = idefics
    cached = []
    for seed, end in ((4, "one"), (4, "two"), (5, "one")):
        text = f"<image>{LONG} {end}"
        ids, rows = reference.of_images(text, [image(seed)])
        prompt = {**prompt_with(text, seed), "target_token_ids": ids[-2:]}
        (output,) = llm.generate([prompt], score_params(), use_tqdm=False)
        np.testing.assert_allclose(
            output.scores.logprobs, own(ids, rows, len(ids) - 2), atol=TOLERANCE
        )
        cached.append(output.num_cached_tokens)
    assert cached[0] == cached[2] == 0
    assert cached[1] > 0


def test_a_bos_of_its_own_moves_the_placeholders(idefics):
    """Without the second BOS that vLLM puts in front, everything stands a token further ahead."""
    llm, reference = idefics
    bos = reference.processor.tokenizer.bos_token
    ids, rows = reference.of_images("See <image>: it is round.", [image(6)])
    prompt = prompt_with(f"{bos}See <image>: it is round.", 6)
    (output,) = llm.generate([prompt], score_params(prompt_logprobs=0), use_tqdm=False)
    (found,) = score(llm, [prompt], use_tqdm=False)
    assert output.prompt_token_ids == ids
    for scores in (output.scores, found):
        np.testing.assert_allclose(scores.logprobs, own(ids, rows, scores.start), atol=TOLERANCE)
        assert any("begins with" in note for note in scores.notes)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (prompt_with("it is <image>", 1), "ends with the placeholders of 'image' data"),
        (
            {**prompt_with("see <image> it", 1), "target_token_ids": [5] * 4},
            r"target_token_ids\[0\] is for prompt position \d+, which is one of the "
            r"placeholders of 'image' data \(\d+\.\.\d+\): \d text positions follow",
        ),
        ({"prompt": "<image> it"}, "the model's placeholder for 'image', and multi_modal_data has"),
        ({"prompt": "<image> it", "multi_modal_data": {"images": []}}, "images"),
        (
            {**prompt_with("see <image> it", 1), "target_token_ids": [VOCABULARY]},
            r"target_token_ids\[0\] is 640, outside the vocabulary",
        ),
        (prompt_with(f"see <image> {LONG * 8}", 1), "maximum context length is 512 tokens"),
    ],
)
def test_what_cannot_be_scored(idefics, prompt, message):
    llm, _ = idefics
    with pytest.raises(ScoreModeError, match=rf"requests\[1\].*{message}"):
        score(llm, ["good", prompt], use_tqdm=False)
    assert len(score(llm, [prompt_with("see <image> it", 1)], use_tqdm=False)[0])


def test_a_refused_image_can_be_sent_again(idefics):
    """vLLM takes an image that it has processed for one that the engine has."""
    llm, reference = idefics
    text, seed = "see <image> it is", 77
    ids, rows = reference.of_images(text, [image(seed)])
    good = {**prompt_with(text, seed), "target_token_ids": ids[-1:]}
    for bad in ({**good, "target_token_ids": [5] * 9}, {**good, "target_token_ids": []}):
        with pytest.raises(ScoreModeError, match="target_token_ids"):
            llm.generate([bad], score_params(), use_tqdm=False)
    (output,) = llm.generate([good], score_params(), use_tqdm=False)
    assert output.scores.logprobs == pytest.approx(own(ids, rows, len(ids) - 1), abs=TOLERANCE)


def test_text_for_a_model_that_attends_both_ways_within_images(gemma):
    llm, expected = gemma
    scores = score(llm, [ids for ids, _ in expected], use_tqdm=False)
    for (ids, rows), found in zip(expected, scores, strict=True):
        np.testing.assert_allclose(found.logprobs, token_logprobs(rows, ids), atol=TOLERANCE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's attention on a CPU is meant")
def test_its_images_are_refused_on_a_cpu(gemma):
    prompt = prompt_with("see <start_of_image> it", 1)
    with pytest.raises(ScoreModeError, match="only backwards, which is another model; use a GPU"):
        score(gemma[0], [prompt], use_tqdm=False)
    with pytest.raises(ScoreModeError, match="only backwards"):
        gemma[0].generate([prompt], score_params(), use_tqdm=False)


def test_images_for_a_model_of_text_are_refused(llm):
    with pytest.raises(ScoreModeError, match=r"requests\[0\]: .*text-only"):
        score(llm, [prompt_with("a text", 1)], use_tqdm=False)


def test_room_for_one_more_in_the_part_for_text(idefics):
    from vllm.score.engine.configuration import with_room_for_one_more

    settings = {"model": idefics[0].llm_engine.model_config.model, "dtype": "float32"}
    larger = with_room_for_one_more(settings)
    assert larger["max_model_len"] == 513
    assert larger["hf_overrides"] == {"text_config": {"model_max_length": 513}}
