"""The harness's model on a tiny random folder: generation, likelihoods, chat, resuming, what is stored and refused."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from baatt.config import BAAttConfig, Policy
from baatt.integrations.enable import enable
from baatt.lab.likelihood import log_likelihood
from baatt.lab.lm_eval.arguments import Sampling
from baatt.models import MaskedDiffusionLM
from baatt.sampling import SamplerConfig, generate
from tests.lab.lm_eval.harness import adapter, request, tiny_folder

RULER = {"do_sample": False, "temperature": 0.0, "max_gen_toks": 30, "until": []}
LONGBENCH = {"do_sample": False, "temperature": 1, "max_gen_toks": 24, "until": ["\n"]}
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
PROMPTS = ["What is a number?", FILLER + "Which colour is the sky?", "One special number:", FILLER * 2]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    with adapter() as found:
        yield found


@pytest.fixture
def make(module: Any, folder: Path) -> Any:
    def build(**arguments: Any) -> Any:
        return module.BAAttLLaDA(**{"pretrained": str(folder), "device": "cpu", "block_length": 8} | arguments)

    return build


def by_hand(folder: Path, lm: Any, prompt: str, tokens: int, steps: int, sparse: Any = None, policy: Any = None) -> str:
    """An answer from `generate` alone."""
    model = MaskedDiffusionLM.from_pretrained(folder)
    sampler = SamplerConfig(steps=steps, gen_length=-(-tokens // 8) * 8, block_length=8, stop_at_eos=True)
    with enable(model, sparse, policy) as handle:
        ids = torch.tensor([lm.tok_encode(prompt)])
        row = generate(model, ids, None, sampler, on_step=handle.at_step).tokens[0].tolist()[:tokens]
    row = row[: row.index(0)] if 0 in row else row
    return str(lm._tokenizer.decode(row))


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generates_as_the_sampler_does(make, folder, batch_size):
    lm = make(batch_size=batch_size)
    answers = lm.generate_until([request(prompt, RULER) for prompt in PROMPTS])
    assert answers == [by_hand(folder, lm, prompt, 30, 32) for prompt in PROMPTS]
    assert len(set(answers)) > 1


def test_tasks_of_different_lengths_in_one_call(make, folder):
    """Answers come in the order of the requests, each with its task's length and steps."""
    lm = make(batch_size=2, gen_length=16, steps=8)
    lengths = [30, 8, 30, 17]
    requests = [request(prompt, RULER | {"max_gen_toks": n}) for prompt, n in zip(PROMPTS, lengths, strict=True)]
    steps = [16, 4, 16, 12]  # half a step per generated token
    expected = [by_hand(folder, lm, *wanted) for wanted in zip(PROMPTS, lengths, steps, strict=True)]
    assert lm.generate_until(requests) == expected


def test_sparse_attention_is_used(make, folder):
    lm = make(sparsity=0.5, block_size=16, segment=16, dense_layers=-1)
    options = {"sparse": BAAttConfig(sparsity=0.5, block_size=16), "policy": Policy(dense_layers=(-1,))}
    answers = lm.generate_until([request(prompt, RULER) for prompt in PROMPTS])
    assert answers == [by_hand(folder, lm, prompt, 30, 32, **options) for prompt in PROMPTS]
    assert answers != make().generate_until([request(prompt, RULER) for prompt in PROMPTS])
    info = lm.get_model_info()
    assert info["sparse_attention_calls"] == info["dense_attention_calls"] > 0
    assert 0.1 < info["achieved_sparsity"] < 0.25  # one layer of two, at most half of its block pairs


def test_stops_and_end_of_text(make):
    lm = make()
    [whole] = lm.generate_until([request(PROMPTS[0], RULER)])
    middle = whole[len(whole) // 2 :][:3]
    assert lm.generate_until([request(PROMPTS[0], RULER | {"until": [middle]})]) == [whole.split(middle)[0]]
    assert lm.generate_until([request(PROMPTS[0], RULER | {"until": middle})]) == [whole.split(middle)[0]]


def test_greedy_requests_are_asked_once_and_sampled_ones_every_time(make):
    lm = make()
    assert len(set(lm.generate_until([request(PROMPTS[0], LONGBENCH)] * 3))) == 1
    sampled = lm.generate_until([request(PROMPTS[0], RULER | {"do_sample": True, "temperature": 1.0})] * 3)
    assert len(set(sampled)) == 3
    assert make().generate_until([request(PROMPTS[0], RULER | {"do_sample": True, "temperature": 1.0})] * 3) == sampled


@pytest.mark.parametrize("truncation", ["left", "middle"])
def test_long_prompts_leave_room_for_the_answer(make, folder, truncation, caplog, monkeypatch, module):
    lm = make(truncation=truncation, max_length=100)
    shown = []

    def spy(model, ids, *rest, **options):
        shown.append(ids[0].tolist())
        return generate(model, ids, *rest, **options)

    monkeypatch.setattr(module, "generate", spy)
    long = "Question first. " + FILLER * 8 + "Question last."
    lm.generate_until([request(long, RULER)])
    ids = lm.tok_encode(long)
    expected = ids[-68:] if truncation == "left" else ids[:34] + ids[-34:]
    assert shown == [expected]  # 100 less 32, to which the 30 tokens of the answer are rounded up
    assert lm.get_model_info()["truncated_prompts"] == 1
    assert f"a prompt of {len(ids)} tokens is cut to 68 ({truncation})" in caplog.text


def test_trained_length_is_the_default(make):
    assert make().max_length == 256
    assert make(max_length=4096).max_length == 4096


# --- likelihood ------------------------------------------------------------------------------------------------------


def test_likelihood_is_llada_s(make, folder):
    lm = make(mc_num=6, batch_size=2, seed=3)
    pairs = [("The sky is", " blue"), ("The sky is ", "green"), ("", "Here we go."), (FILLER, " and back")]
    model = MaskedDiffusionLM.from_pretrained(folder)
    for (context, answer), (score, greedy) in zip(pairs, lm.loglikelihood([request(*x) for x in pairs]), strict=True):
        whole, before = lm.tok_encode(context + answer), len(lm.tok_encode(context.rstrip()))
        expected = log_likelihood(
            model, whole[:before], whole[before:], device=torch.device("cpu"), draws=6, batch_size=2, seed=3
        )  # fmt: skip
        assert score == pytest.approx(expected)
        assert greedy is False


def test_likelihood_with_sparse_attention(make, folder):
    lm = make(mc_num=4, sparsity=0.8, block_size=16)
    [(score, _)] = lm.loglikelihood([request(FILLER * 2, " and back again")])
    [(dense, _)] = make(mc_num=4).loglikelihood([request(FILLER * 2, " and back again")])
    whole, before = lm.tok_encode(FILLER * 2 + " and back again"), len(lm.tok_encode((FILLER * 2).rstrip()))
    model = MaskedDiffusionLM.from_pretrained(folder)
    with enable(model, lm.arguments.sparse):
        expected = log_likelihood(model, whole[:before], whole[before:], device=torch.device("cpu"), draws=4)
    assert score == pytest.approx(expected)
    assert score != pytest.approx(dense, rel=1e-4)
    assert lm.get_model_info()["sparse_attention_calls"] > 0


def test_is_greedy_is_what_the_model_generates(make):
    lm = make(is_check_greedy=True, mc_num=1)
    context = lm.tok_encode("The sky is")
    sampler = Sampling(gen_length=2, block_length=2).config(2)
    tokens = generate(lm._model, torch.tensor([context]), None, sampler).tokens[0].tolist()
    assert lm._is_greedy(context, tokens)
    assert not lm._is_greedy(context, tokens[::-1] if tokens[0] != tokens[1] else [2, 3])
    assert [greedy for _, greedy in lm.loglikelihood([request("The sky is", " blue")])] == [False]
    with pytest.raises(ValueError, match="is_check_greedy must be False for a request without context"):
        lm.loglikelihood([request("", "blue")])


def test_rolling_likelihood(make):
    lm = make(mc_num=2, max_length=16)
    text = FILLER.strip()
    ids = lm.tok_encode(text)
    assert len(ids) > 16
    [score] = lm.loglikelihood_rolling([request(text)])
    [(first, _)] = lm.loglikelihood([request("", lm._tokenizer.decode(ids[:16]))])
    assert score < first < 0
    short = FILLER[:20]
    [(whole, _)] = lm.loglikelihood([request("", short)])
    assert lm.loglikelihood_rolling([request(short)]) == [pytest.approx(whole)]


# --- what the harness asks besides -----------------------------------------------------------------------------------


def test_chat_template(make, folder):
    lm = make()
    asked = [{"role": "user", "content": "What?"}]
    assert lm.apply_chat_template(asked) == "<|user|>What?<|endoftext|><|assistant|>"
    begun = [*asked, {"role": "assistant", "content": "The answer is"}]
    prompt = lm.apply_chat_template(begun, add_generation_prompt=False)  # how the harness hands over a gen_prefix
    assert prompt == "<|user|>What?<|endoftext|><|assistant|>The answer is"
    assert lm.chat_template(True) == lm.chat_template("default")
    assert (lm.chat_template(False), lm.chat_template(None)) == (None, None)
    with pytest.raises(ValueError, match=r"must be one of \['default'\], got 'rag'"):
        lm.chat_template("rag")
    assert lm.tokenizer_name == str(folder).replace("/", "__")


def test_what_a_tokenizer_adds_and_cuts(make, tmp_path):
    """A beginning of text is added once; a length or padding stored in the file changes nothing."""
    folder = tiny_folder(tmp_path / "t")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|mask|> $A", special_tokens=[("<|mask|>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|mask|>"}))
    lm = make(pretrained=str(folder))
    plain = make().tok_encode(FILLER)
    assert len(plain) > 4
    assert lm.tok_encode(FILLER) == lm.tok_encode("<|mask|>" + FILLER) == [1, *plain]


def test_command_line_defaults_give_way(module, folder):
    text = f"pretrained={folder},device=cpu,batch_size=3,block_length=8"
    lm = module.BAAttLLaDA.create_from_arg_string(text, {"batch_size": 1, "device": "cuda:0", "max_batch_size": None})
    assert (lm.arguments.batch_size, lm.device.type) == (3, "cpu")
    values = {"pretrained": str(folder)}
    lm = module.BAAttLLaDA.create_from_arg_obj(values, {"batch_size": 2, "device": "cpu"})
    assert (lm.arguments.batch_size, lm.rank, lm.world_size) == (2, 0, 1)


def test_what_is_stored_with_the_results(make, folder):
    lm = make(sparsity=0.5, dense_layers="0+1")
    info = json.loads(json.dumps(lm.get_model_info()))
    assert info["baatt_settings"]["sparse"] == dataclasses.asdict(BAAttConfig(sparsity=0.5))
    assert (info["model_dtype"], info["max_length"], info["achieved_sparsity"]) == ("float32", 256, None)
    assert info["model_num_parameters"] == sum(
        x.numel() for x in MaskedDiffusionLM.from_pretrained(folder).parameters()
    )


def test_says_when_nothing_was_sparse(make, caplog):
    lm = make(sparsity=0.5, dense_layers="0+1")
    lm.generate_until([request(PROMPTS[0], RULER)])
    lm.get_model_info()
    assert "no attention call was sparse" in caplog.text


def test_partial_answers_reach_the_harness_s_cache(make):
    lm = make(mc_num=1)
    kept = []
    lm.cache_hook = SimpleNamespace(add_partial=lambda *parts: kept.append(parts))
    [text] = lm.generate_until([request(PROMPTS[0], LONGBENCH)])
    [score] = lm.loglikelihood([request("The sky is", " blue")])
    assert kept == [
        ("generate_until", (PROMPTS[0], LONGBENCH), text), ("loglikelihood", ("The sky is", " blue"), score)
    ]  # fmt: skip


# --- resuming --------------------------------------------------------------------------------------------------------


def test_resumes(make, tmp_path, monkeypatch, module):
    requests = [request(prompt, RULER) for prompt in PROMPTS]
    pairs = [request("The sky is", " blue"), request("The grass is", " green")]
    first = make(save_dir=str(tmp_path), mc_num=2)
    answers, scores = first.generate_until(requests), first.loglikelihood(pairs)
    rolling = first.loglikelihood_rolling([request("Here we go.")])
    assert len((tmp_path / "rank0.jsonl").read_text().splitlines()) == 7
    again = make(save_dir=str(tmp_path), mc_num=2)
    monkeypatch.setattr(module, "generate", None)
    monkeypatch.setattr(module, "log_likelihood", None)
    assert (again.generate_until(requests), again.loglikelihood(pairs)) == (answers, scores)
    assert again.loglikelihood_rolling([request("Here we go.")]) == rolling
    with pytest.raises(TypeError, match="not callable"):
        make(save_dir=str(tmp_path), mc_num=2, steps=128).generate_until(requests[:1])  # other settings


def test_an_interruption_loses_one_batch(make, tmp_path, monkeypatch, module):
    calls = []

    def breaks(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(module, "generate", breaks)
    requests = [request(prompt, RULER) for prompt in PROMPTS]
    with pytest.raises(KeyboardInterrupt):
        make(save_dir=str(tmp_path)).generate_until(requests)
    assert len((tmp_path / "rank0.jsonl").read_text().splitlines()) == 2
    answers = make(save_dir=str(tmp_path)).generate_until(requests)
    assert len(calls) == 5
    assert answers == make().generate_until(requests)


# --- refused ---------------------------------------------------------------------------------------------------------


def test_refused(make, module, folder, tmp_path):
    with pytest.raises(ValueError, match=r"model_args must be among .*; got trust_remote_code"):
        make(trust_remote_code=True)
    with pytest.raises(FileNotFoundError, match="must be downloaded to a local folder first"):
        make(pretrained="GSAI-ML/LLaDA-8B-Instruct")
    with pytest.raises(ValueError, match=r"policy.dense_layers must lie in \[-2, 2\) for 2 layers, got 7"):
        make(sparsity=0.5, dense_layers=7)
    with pytest.raises(ValueError, match="impl must be one of"):
        make(sparsity=0.5, impl="fastest")
    with pytest.raises(ValueError, match="device must be a device such as"):
        make(device="tpu-7")
    with pytest.raises(ValueError, match=r"dense_steps must be 0 for a likelihood, which has no steps, got 0\.2"):
        make(sparsity=0.5, dense_steps=0.2).loglikelihood([request("a", " b")])
    with pytest.raises(ValueError, match="max_length must leave two tokens for the prompt beside 32"):
        make(max_length=32).generate_until([request("a prompt", RULER)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(make):
    with pytest.raises(ValueError, match="device cuda:0 needs a GPU that PyTorch can use"):
        make(device="cuda:0")


def test_settings_are_logged(make, caplog):
    caplog.set_level(logging.INFO, "baatt")
    make(sparsity=0.5)
    assert "'sparsity': 0.5" in caplog.text
