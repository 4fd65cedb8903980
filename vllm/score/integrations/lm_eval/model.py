"""The model class that lm-eval drives."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

from lm_eval.api.model import TemplateLM
from pydantic import BeforeValidator

from vllm.score.armed import require_score_mode
from vllm.score.checks import Count, Whole, check, check_name
from vllm.score.continuations import score_token_pairs
from vllm.score.engine.configuration import check_llm
from vllm.score.errors import ScoreModeError
from vllm.score.integrations.lm_eval.engine import (
    engine_options,
    length_asked_for,
    load_tokenizer,
    longest_input,
    lora_request,
    start_engine,
    whole_number,
)
from vllm.score.integrations.lm_eval.requests import (
    SIDES,
    Encoder,
    Generation,
    fit_context,
    fit_pairs,
    read_generation_kwargs,
)
from vllm.score.integrations.lm_eval.scaled import ScaledGeneration, ScaledRequest, split_settings

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from vllm import LLM

logger = logging.getLogger("lm_eval.vllm_score")  # LMEVAL_LOG_LEVEL holds

# A pair as lm-eval hands it on: its texts (None for windows), context, continuation.
KeyedPair = tuple[tuple[str, str] | None, list[int], list[int]]


class VLLMScoreLM(TemplateLM):
    """vLLM's score mode as a model of lm-eval.

    All log-likelihoods that lm-eval asks for at once come from one `vllm.score.score()` call: the
    prefix cache holds few-shot contexts, the one-token options of a question are one request, and
    equal requests are computed once.

    The options are those of lm-eval's `vllm` model, with the same names.

    Args:
        pretrained: name or folder of the model.
        llm: a running `vllm.LLM` to use instead of starting one.
        max_model_len: tokens that the model reads at most, as `max_length` of lm-eval's `hf` model
            counts them; by default as many as it can.
        max_length: the same by its other name.
        batch_size: accepted and not used: vLLM batches by itself.
        max_batch_size: vLLM's `max_num_seqs`.
        add_bos_token: True or False: with or without the tokenizer's special tokens.
        prefix_token_id: what a text without context follows; by default BOS, else EOS.
        max_gen_toks: tokens to generate where a task names no number.
        truncation_side: of contexts too long to generate from: left, right or middle.
        lora_local_path: folder of an adapter for all requests.
        chat_template_args: further arguments of the chat template, a dict or JSON.
        enable_thinking: one of them; needs `think_end_token`.
        think_end_token: the answer is what follows it.
        options: of `vllm.LLM`, e.g. dtype, revision, tensor_parallel_size, quantization; `device`
            and `swap_space` are ignored.

    Attributes:
        batch_size: as given.
        max_length: tokens that the model reads at most, as lm-eval's `hf` model counts them. A
            context and its continuation may have one more together: the last is only predicted.
        max_gen_toks: as given.
        config: of Hugging Face, of the model.

    Raises:
        ScoreModeError: for options that contradict each other, before the engine starts.
        ScoreModeUnavailable: score mode is off in this installation.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        llm: LLM | None = None,
        max_model_len: int | None = None,
        max_length: int | None = None,
        batch_size: str | int = "auto",
        max_batch_size: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = 256,
        truncation_side: str = "left",
        lora_local_path: str | None = None,
        chat_template_args: Mapping[str, Any] | str | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if llm is not None:
            check_llm(llm)
        self.batch_size = batch_size
        self.max_gen_toks: int = whole_number("max_gen_toks", max_gen_toks, Count)
        prefix_token_id = whole_number("prefix_token_id", prefix_token_id, Whole | None)
        check_name("truncation_side", truncation_side, SIDES)
        self._truncation_side, self._think_end = truncation_side, think_end_token
        self._template = _template_arguments(chat_template_args, enable_thinking, think_end_token)
        asked = length_asked_for(max_model_len, max_length)
        ours = {
            "model": None if pretrained is None else str(pretrained),
            "max_model_len": asked,
            "max_num_seqs": max_batch_size,
            "enable_lora": None if lora_local_path is None else True,
        }
        settings = engine_options(ours, options, runs=llm is not None)
        require_score_mode()
        self.model = start_engine(settings) if llm is None else llm
        self.max_length = longest_input(self.model, asked, given=llm is not None)
        self.tokenizer = load_tokenizer(self.model, add_bos_token)
        self.config = self.model.llm_engine.model_config.hf_config
        self._encoder = Encoder(self.tokenizer, add_bos_token, prefix_token_id)
        self._lora_request = lora_request(lora_local_path)

    @classmethod
    def from_llm(cls, llm: LLM, **options: Any) -> VLLMScoreLM:
        """The model around an `LLM` that runs already; the engine's options are its own."""
        return cls(llm=llm, **options)

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows."""
        return self._encoder.prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which lm-eval caches a task's requests."""
        return str(self.model.llm_engine.model_config.tokenizer).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; no second prefix token where the text starts with one."""
        return self._encoder.encode([string], add_special_tokens)[0]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without its system message where the template takes none."""
        from jinja2 import TemplateError

        render: Callable[[list[dict[str, str]]], str] = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._template,
        )
        try:
            return render(chat_history)
        except TemplateError:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            logger.warning("The chat template refuses the system message; it is left out.")
            return render(without)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results."""
        from vllm.score.patches.engine_core import versions

        config = self.model.llm_engine.model_config
        return {
            "model_dtype": str(config.dtype),
            "model_revision": config.revision or "main",
            "model_sha": getattr(config.hf_config, "_commit_hash", None) or "",
            "versions": versions(),
        }

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """By request: log-probability of the continuation in nats, and whether it is greedy."""
        if self._template.get("enable_thinking"):
            tasks = ", ".join(sorted({r.task_name for r in requests if r.task_name})) or "a task"
            raise ScoreModeError(
                f"enable_thinking=True is for generation tasks, and {tasks} asks for "
                "log-likelihoods: evaluate it in a run of its own."
            )
        texts = _arguments_of(requests)
        pairs = self._encoder.encode_pairs(texts, disable_tqdm)
        return self._loglikelihood_tokens(
            [(text, *pair) for text, pair in zip(texts, pairs, strict=True)], disable_tqdm
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """By request: log-probability of the whole text in nats, in the rolling windows of
        lm-eval's `hf` model: of max_length tokens, each with a token of context or more."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        texts = [args[0] for args in _arguments_of(requests)]
        windows: list[list[KeyedPair]] = []
        for ids in self._encoder.encode(texts):
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows.append([(None, *make_disjoint_window(window)) for window in rolling])
        answers = iter(self._loglikelihood_tokens(list(chain(*windows)), disable_tqdm))
        totals = [sum((next(answers)[0] for _ in each), 0.0) for each in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[KeyedPair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = fit_pairs([(c, t) for _, c, t in requests], self.max_length)
        scored = [pair for pair in pairs if pair[1]]
        if len(scored) < len(pairs):
            logger.warning(
                "%d of %d continuations have no tokens: the log-probability of nothing is 0.",
                len(pairs) - len(scored),
                len(pairs),
            )
        scores = score_token_pairs(
            self.model,
            scored,
            statistics=["argmax"],
            use_tqdm=not disable_tqdm,
            lora_request=self._lora_request,
        )
        answers = ((each.sum(), each.is_greedy) for each in scores)
        found = [next(answers) if continuation else (0.0, True) for _, continuation in pairs]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """By request: the generated text up to the first stop sequence.

        Requests whose `gen_kwargs` name a scaler (`scale_func_name`) are generated as
        `vllm.score.integrations.lm_eval.scaled` says.
        """
        contexts = self._encoder.encode([args[0] for args in _arguments_of(requests)])
        ordinary: dict[int, tuple[list[int], Generation]] = {}
        scaled: dict[int, ScaledRequest] = {}
        end = self.tokenizer.eos_token_id
        eos = None if end is None else self.tokenizer.decode([end]) or self.tokenizer.eos_token
        settings = split_settings([request.args[1] for request in requests])
        for index, (call, rest) in enumerate(settings):
            generation = read_generation_kwargs(
                rest,
                eos=eos,
                max_gen_toks=self.max_gen_toks,
                stop_at_eos_only=self._think_end is not None,
                task=requests[index].task_name,
            )
            if call is None:
                ordinary[index] = self._fitting(contexts[index], generation), generation
            else:
                scaled[index] = ScaledRequest(contexts[index], call, generation)
        texts = self._generate(ordinary, disable_tqdm) | self._generate_scaled(scaled, disable_tqdm)
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[index])
        return [texts[index] for index in range(len(requests))]

    def _fitting(self, ids: list[int], generation: Generation) -> list[int]:
        room = self.max_length - generation.max_gen_toks
        if room < 1:
            raise ScoreModeError(
                f"max_gen_toks is {generation.max_gen_toks}, which leaves no room for a "
                f"context in max_model_len={self.max_length}: lower it or raise max_model_len."
            )
        return fit_context(ids, room, self._truncation_side) or [self.prefix_token_id]

    def _generate(
        self, requests: dict[int, tuple[list[int], Generation]], disable_tqdm: bool
    ) -> dict[int, str]:
        from lm_eval.models.utils import postprocess_generated_text

        if not requests:
            return {}
        outputs = self.model.generate(
            [{"prompt_token_ids": ids} for ids, _ in requests.values()],
            [generation.params for _, generation in requests.values()],
            use_tqdm=not disable_tqdm,
            lora_request=self._lora_request,
        )
        return {
            i: postprocess_generated_text(output.outputs[0].text, given.until, self._think_end)
            for (i, (_, given)), output in zip(requests.items(), outputs, strict=True)
        }

    def _generate_scaled(
        self, requests: dict[int, ScaledRequest], disable_tqdm: bool
    ) -> dict[int, str]:
        if not requests:
            return {}
        generation = ScaledGeneration(
            self.model,
            prefix_token_id=lambda: self.prefix_token_id,
            max_length=self.max_length,
            think_end=self._think_end,
            truncation_side=self._truncation_side,
            lora_request=self._lora_request,
            use_tqdm=not disable_tqdm,
        )
        return dict(zip(requests, generation.texts(list(requests.values())), strict=True))


def _arguments_of(requests: Sequence[Instance]) -> list[Any]:
    if not isinstance(requests, Sequence) or not all(hasattr(r, "args") for r in requests):
        raise ScoreModeError(
            "requests must be a list of lm_eval.api.instance.Instance, as lm_eval makes them; for "
            "texts of your own use vllm.score.score or SequenceProbVLLMHook."
        )
    return [request.args for request in requests]


def _from_json(given: Any) -> Any:
    return json.loads(given) if isinstance(given, str) else given


_TemplateArguments = Annotated[dict[str, Any] | None, BeforeValidator(_from_json)]


def _template_arguments(
    given: Mapping[str, Any] | str | None, enable_thinking: bool | None, think_end: str | None
) -> dict[str, Any]:
    """Further arguments of the chat template.

    Args:
        given: a dict, or one as JSON.
        enable_thinking: one of the arguments.
        think_end: text after which the answer begins, without which nobody may think.
    """
    remedy = "give a dict, or one as JSON"
    arguments = dict(check("chat_template_args", given, _TemplateArguments, remedy) or {})
    if enable_thinking is not None:
        arguments["enable_thinking"] = enable_thinking
    if arguments.get("enable_thinking") and think_end is None:
        raise ScoreModeError(
            "enable_thinking=True without think_end_token: name the token after which the answer "
            "begins, for example think_end_token='</think>'."
        )
    return arguments
