"""Every patch against a vLLM that changed: the contract breaks, or the call is handed on whole."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import wrapt

from vllm.score.armed import upstream_version
from vllm.score.patches import REGISTER
from vllm.score.patches.contract import form_of, record, recorded_forms
from vllm.score.patches.patch import Patch, calling, reads

PARAMETER = inspect.Parameter("more", inspect.Parameter.POSITIONAL_OR_KEYWORD)
AMENDED = [(patch, dotted) for patch in REGISTER for dotted in patch.contract]
WRAPPED = [(patch, dotted) for patch in REGISTER for dotted in patch.wrappers]


def names(values: list[tuple[Patch, str]]) -> list[str]:
    return [f"{patch.target}:{dotted}" for patch, dotted in values]


def in_front(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    first = parameters[0]
    return [first, PARAMETER.replace(kind=first.kind, default=first.default), *parameters[1:]]


def renamed(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    return [*parameters[:-1], parameters[-1].replace(name="other")]


def behind(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    return [*parameters, PARAMETER.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=None)]


@pytest.fixture(autouse=True)
def stock_class(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own SamplingParams, for contracts with it; ours has its place in this process."""
    for patch in REGISTER:  # now, or they would take the stock class for good
        import_module(patch.target)
    if "ordinary" not in request.node.name:
        module = import_module("vllm.sampling_params")
        monkeypatch.setattr(module, "SamplingParams", module.SamplingParams.__base__)


def problem_in(patch: Patch) -> str | None:
    return patch.contract_problem(import_module(patch.target), upstream_version())


@pytest.mark.parametrize("change", [in_front, renamed, behind])
@pytest.mark.parametrize(("patch", "dotted"), AMENDED, ids=names(AMENDED))
def test_a_changed_signature_breaks_the_contract(
    patch: Patch, dotted: str, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, name, found = wrapt.resolve_path(import_module(patch.target), dotted)
    signature = inspect.signature(getattr(found, "__func__", found))
    parameters = list(signature.parameters.values())
    variable = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    if change is behind and parameters[-1].kind in variable:
        pytest.skip("takes any argument")

    def altered(*args: Any, **kwargs: Any) -> None: ...

    altered.__signature__ = signature.replace(parameters=change(parameters))  # type: ignore[attr-defined]
    assert problem_in(patch) is None
    monkeypatch.setattr(parent, name, altered)
    problem = problem_in(patch)
    assert problem is not None and dotted in problem and "takes" in problem


@pytest.mark.parametrize(("patch", "dotted"), AMENDED, ids=names(AMENDED))
def test_a_function_that_is_gone_breaks_the_contract(
    patch: Patch, dotted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module(patch.target)
    parent, name, _ = wrapt.resolve_path(module, dotted)
    left = {n: f for n, f in vars(parent).items() if n != name and inspect.isroutine(f)}
    monkeypatch.setattr(module, parent.__name__, type(parent.__name__, (), left))
    # Every object has an __init__, which takes nothing.
    takes = f"{dotted} takes (self, /, *args, **kwargs), not (self, "
    problem = problem_in(patch)
    assert problem is not None
    assert problem.startswith(takes if name == "__init__" else f"{dotted} does not exist")


FIELDS = [(patch, name) for patch in REGISTER for name in patch.fields]


@pytest.mark.parametrize(("patch", "field"), FIELDS, ids=names(FIELDS))
def test_a_field_of_another_type_breaks_the_contract(
    patch: Patch, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, _, dotted = field.rpartition(":")
    owner, _, name = dotted.partition(".")
    module = import_module(home or patch.target)

    class Altered(getattr(module, owner)):  # type: ignore[misc]
        max_tokens: str = ""
        prompt_logprob_token_ids: str = ""
        prompt_logprob_start: str = ""
        skip_reading_prefix_cache: str = ""
        stop_token_ids: str = ""
        prompt_token_id_logprobs: str = ""
        prompt_token_id_logprobs_dict: str = ""

    assert name in Altered.__annotations__
    assert problem_in(patch) is None
    monkeypatch.setattr(module, owner, Altered)
    problem = problem_in(patch)
    assert problem is not None and "is typed str, not" in problem


CALLED = [(patch, name) for patch in REGISTER for name in patch.calls]


@pytest.mark.parametrize(("patch", "called"), CALLED, ids=names(CALLED))
def test_a_call_site_that_moved_breaks_the_contract(
    patch: Patch, called: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved() -> None: ...

    for caller in patch.calls[called]:
        parent, name, found = wrapt.resolve_path(import_module(patch.target), caller)
        moved.__signature__ = inspect.signature(found)  # type: ignore[attr-defined]
        monkeypatch.setattr(parent, name, moved)
    problem = problem_in(patch)
    assert problem is not None and "is not called by" in problem


# --- an ordinary call, of more arguments than anybody knows


def ordinary(name: str) -> Any:
    """What an ordinary request has for a parameter that one of our wrappers reads."""
    from vllm import SamplingParams
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    if name in ("params", "sampling_params"):
        return SamplingParams()
    if name == "request":
        request = CompletionRequest(model="m", prompt="x")
        return request.__class__.model_construct(**dict(request), sampling_params=SamplingParams())
    return {"prompt": {"type": "token", "prompt_token_ids": [1]}, "index": 0}.get(name, {})


@pytest.mark.parametrize(("patch", "dotted"), WRAPPED, ids=names(WRAPPED))
async def test_an_ordinary_call_is_handed_on_whole(patch: Patch, dotted: str) -> None:
    given = {name: ordinary(name) for name in reads(patch.wrappers[dotted])}
    seen: list[Any] = []
    answer = ordinary("params")
    found = wrapt.resolve_path(import_module(patch.target), dotted)[2].__wrapped__
    is_coroutine = inspect.iscoroutinefunction(inspect.unwrap(getattr(found, "__func__", found)))

    def stock(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))

        async def answered() -> Any:
            return answer

        return answered() if is_coroutine else answer

    parameters = inspect.signature(getattr(found, "__func__", found)).parameters
    places = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    args = [given.get(name) for name in places]
    keywords = {name: value for name, value in given.items() if name not in places}
    instance = ordinary("request")  # of the endpoints' patches; the others look for less
    vars(instance).update(
        engine_client=None,
        input_processor=SimpleNamespace(),
        vllm_config=SimpleNamespace(lora_config=None),
        requests={},
        prefix_replay_tokens=0,
        kv_cache_manager=SimpleNamespace(),
        connector=None,
    )
    wrapper = calling(patch.wrappers[dotted], found)
    result = wrapper(stock, instance, [*args, "unheard of"], {**keywords, "unknown": 1})
    if inspect.isawaitable(result):
        await result
    assert seen == [((*args, "unheard of"), {**keywords, "unknown": 1})]


# --- the record


def test_the_installed_release_is_on_record() -> None:
    release = upstream_version().partition("+")[0]
    assert release in record()
    for patch, dotted in AMENDED:
        name = f"{patch.target}:{dotted}"
        found = wrapt.resolve_path(import_module(patch.target), dotted)[2]
        assert record()[release][name][0] == form_of(found), name


def test_every_release_has_what_is_amended() -> None:
    assert list(record()) == ["0.31.0", "0.32.0", "0.33.0"]
    for release, entries in record().items():
        for patch, dotted in AMENDED:
            assert f"{patch.target}:{dotted}" in entries, release
        for patch in REGISTER:
            for callers in patch.calls.values():
                assert any(f"{patch.target}:{caller}" in entries for caller in callers), release


def test_releases_differ_where_the_patches_ask() -> None:
    """What is read from a signature or a type, and not from a version number."""
    lookup = "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks"
    assert set(recorded_forms(lookup)) == {"self, request", "self, request, max_cache_hit_length="}
    channel = "vllm.sampling_params:SamplingParams.prompt_logprob_token_ids"
    assert len(recorded_forms(channel)) == 2
