"""The two usage examples of the specification, on a tiny model and a local copy of the data."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from vllm.score.processor import DATASET_REGISTRY, SequenceProcessor, register_dataset
from vllm.score.processor.datasets import Gsm8kR1Template
from vllm.score.processor.sequences import pad_batch


@pytest.fixture
def gsm8k(tmp_path, monkeypatch):
    """A local copy with 10 questions in both splits."""
    questions = [f"What is {i} + {i}?" for i in range(10)]
    answers = [f"Twice {i}.\n#### {2 * i}" for i in range(10)]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        table = pa.table({"question": questions, "answer": answers})
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    monkeypatch.setitem(DATASET_REGISTRY, "gsm8k_r1_template", None)
    copy = Gsm8kR1Template(path=str(tmp_path), config=None)
    register_dataset("gsm8k_r1_template", copy, replace=True)


@pytest.fixture(scope="module")
def model_and_tokenizer(model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_dir("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.usefixtures("gsm8k")
def test_generate_score_and_move_the_parameters(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    cfg = {
        "generation": {
            "temperature": 1.0,
            "top_p": 1.0,
            "max_new_tokens": 6,
            "gen_batch_size": 16,
            "tf_batch_size": 8,
        },
        "precision": {
            "func_override": {"autocast": False, "dtype": "float32", "cast_params": True},
            "tf_nograd": {"autocast": False, "dtype": "float32", "cast_logits_fp32": True},
            "allow_tf32": True,
            "matmul_precision": "high",
            "entropy_fp64": False,
        },
    }
    precision = torch.get_float32_matmul_precision()
    try:
        sp = SequenceProcessor(model, tokenizer, logger=None, config=cfg)
        seqs, lps, diags = sp.generate_with_logprobs(
            prompts=None,
            G=4,
            dataset_name="gsm8k_r1_template",
            split="test",
            num_prompts=8,
            compute_rb=True,
        )
        assert seqs.sequences.shape[:2] == (8, 4)
        assert [len(group) for group in lps.rewards] == [4] * 8
        assert len(diags.diagnostics) == 8
        assert lps.rb_entropies[0][0].shape == (seqs.gen_lens[0][0],)

        torch.manual_seed(0)
        update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        mapping = sp._build_params_override(v_named=update, eta=1e-6)
        moved = sp.teacher_force_logprobs(
            seqs, with_grad=False, compute_rb=True, params_override=mapping
        )
        change = max(
            float((a - b).abs().max())
            for one, two in zip(moved.logprobs, lps.logprobs, strict=True)
            for a, b in zip(one, two, strict=True)
        )
        assert 0 < change < 1e-2
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.usefixtures("gsm8k")
def test_replacement_sampling_by_the_engine(llm, caplog):
    sp = SequenceProcessor(llm=llm, config={"generation": {"max_new_tokens": 3}})
    seqs, lps, diags = sp.generate_with_replacement_sampling(
        total_sequences=24,
        dataset_name="gsm8k_r1_template",
        split="train",
        seed=42,
        G=1,
        compute_rb=True,
    )
    assert seqs.sequences.shape[:2] == (24, 1)
    assert len(lps.sequence_logqs) == len(diags.diagnostics) == len(lps.rewards) == 24
    starts = {tuple(row[0, : seqs.prompt_lens[0]].tolist()) for row in seqs.sequences}
    assert 1 < len(starts) <= 10
    assert "independent" not in caplog.text
    pool = sp.generate_with_replacement_sampling(
        3, "gsm8k_r1_template", max_prompts_pool=1, seed=1, G=2
    )[0]
    assert pool.sequences.shape[:2] == (3, 1)
    assert len({tuple(row[0, : pool.prompt_lens[0]].tolist()) for row in pool.sequences}) == 1
    assert "independent" in caplog.text


def test_what_a_call_lacks_is_named(llm):
    from vllm.score.errors import ScoreModeError

    sp = SequenceProcessor(llm=llm)
    with pytest.raises(ScoreModeError, match="prompts and dataset_name are both missing"):
        sp.generate_with_logprobs()
    with pytest.raises(ScoreModeError, match="not both"):
        sp.generate_with_logprobs(["a"], dataset_name="local_file")
    with pytest.raises(ScoreModeError, match=r"data set .* 'gsm9k' is unknown"):
        sp.generate_with_logprobs(dataset_name="gsm9k")
    with pytest.raises(ScoreModeError, match="G must be a whole number"):
        sp.generate_batched(["a"], 0)
    with pytest.raises(ScoreModeError, match="gen_batch_size must be a whole number"):
        sp.generate_batched(["a"], 1, gen_batch_size=0)
    batch = pad_batch([[5]], [[[6]]], 0, lambda ids: "")
    with pytest.raises(ScoreModeError, match="tf_batch_size must be a whole number"):
        sp.teacher_force_logprobs(batch, tf_batch_size=0)
    with pytest.raises(ScoreModeError, match="needs with_grad=True"):
        sp.teacher_force_logprobs(batch, return_baseline_features=True)
    with pytest.raises(ScoreModeError, match="prompts is empty; give at least one text"):
        sp.generate_batched([])
    with pytest.raises(ScoreModeError, match="examples has 1 entries for 2 prompts"):
        sp._compute_rewards(["a", "b"], None, [object()])
