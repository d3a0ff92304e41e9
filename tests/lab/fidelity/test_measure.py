"""Models of several kinds read densely and sparsely: states and logits, the measures, runs that were not sparse."""

import dataclasses

import pytest
import torch

from baatt import BAAttConfig, Policy, enable
from baatt.assets import held_out_text, shipped_model
from baatt.lab.answers import AnswerStore
from baatt.lab.fidelity import measure, reader
from baatt.lab.fidelity.documents import Masks, make_documents
from baatt.lab.fidelity.measure import Comparison, DenseRunError, compare, find_shift, record_of
from baatt.lab.fidelity.profile import costs_of
from baatt.lab.fidelity.reader import Reader
from baatt.lab.fidelity.study import Cell, Setup, Study
from baatt.lab.loading import find_mask_token, load_model, load_transformers
from baatt.models.checkpoint import load_tokenizer
from tests.lab.fidelity.models import MASK, llada_folder, transformers_folder

CPU = torch.device("cpu")
#: A part of what is shipped, all of which would be made into tokens again and again.
TEXT = held_out_text()[:40_000]
HALF = BAAttConfig(block_size=16, sparsity=0.5)
GROUPED = {"num_key_value_heads": 2}
SETUP = Setup({}, "float32", "auto", documents=2, needles=3, seed=0, mask_share=0.2, batch_size=2)


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    return load_model(llada_folder(tmp_path_factory.mktemp("llada")), dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def documents():
    tokenizer, masks = load_tokenizer(shipped_model()), Masks(MASK, 0.2)
    return make_documents(tokenizer, TEXT, 512, count=3, needles=3, seed=0, masks=masks)


KINDS = {
    "Qwen2ForCausalLM": (False, GROUPED),
    "LlamaForCausalLM": (True, {**GROUPED, "is_causal": False}),
    "Gemma2ForCausalLM": (False, {**GROUPED, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "ModernBertForMaskedLM": (True, {"cls_token_id": 2, "sep_token_id": 3}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_transformers_are_read_as_they_are(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, kind):
        pytest.skip(f"this version has no {kind}")
    ahead, options = KINDS[kind]
    model, tokenizer = load_transformers(
        transformers_folder(tmp_path, kind, **options), dtype=torch.float32, device=CPU, head=True
    )
    if kind.startswith("Llama") and not Reader(model, MASK).sees_ahead:
        pytest.skip("this version does not heed config.is_causal")
    found = Reader(model, find_mask_token(model, tokenizer, tmp_path))
    assert (found.sees_ahead, found.shift, found.mask_token) == (ahead, 0 if ahead else 1, MASK)
    tokens = torch.randint(5, 4000, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(tokens).logits
    logits = found.logits(found.states(tokens).flatten(0, 1))
    torch.testing.assert_close(logits, expected.flatten(0, 1))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if ahead:
        with pytest.raises(ValueError, match="model must have a mask token"):
            Reader(model, None)


def test_a_folder_without_a_head_is_refused(tmp_path):
    pytest.importorskip("transformers")
    transformers_folder(tmp_path, "Qwen2Model", **GROUPED)
    with pytest.raises(ValueError, match=r"must hold a language model with its head, .* got Qwen2Model"):
        load_transformers(tmp_path, dtype=torch.float32, device=CPU, head=True)


def test_our_model_and_slabs_of_logits(llada, monkeypatch):
    model, _ = llada
    found = Reader(model, MASK)
    assert (found.sees_ahead, found.vocabulary) == (True, 4096)
    tokens = torch.randint(5, 4000, (1, 40), generator=torch.Generator().manual_seed(0))
    states = found.states(tokens)[0]
    with torch.inference_mode():
        torch.testing.assert_close(found.logits(states), model(tokens)[0])
    whole = compare(found, states, states.flip(0), tokens[0])
    monkeypatch.setattr(measure, "SLAB", 2 * 4096 * 7)
    torch.testing.assert_close(compare(found, states, states.flip(0), tokens[0]), whole)


def test_measures_by_hand(llada, documents):
    found = Reader(llada[0], MASK)
    comparison = Comparison(found, documents, batch_size=2)
    measured = comparison.measure(HALF, Policy())
    dense = comparison.measure(None, Policy())
    with torch.inference_mode(), enable(llada[0], HALF):
        sparse = llada[0](torch.tensor([documents[1].inputs]))[0].double().log_softmax(-1)
    with torch.inference_mode():
        plain = llada[0](torch.tensor([documents[1].inputs]))[0].double().log_softmax(-1)
    rows = documents[1].targets
    kl = (plain.exp() * (plain - sparse)).sum(-1)[rows].mean()
    assert measured["kl"][1] == pytest.approx(float(kl), rel=1e-3)
    assert measured["kl"][1] > 1e-3
    loss = -sum(float(sparse[place, documents[1].tokens[place]]) for place in rows) / len(rows)
    assert measured["loss"][1] == pytest.approx(loss, rel=1e-4)
    agree = (plain.argmax(-1) == sparse.argmax(-1))[rows].double().mean()
    assert measured["agreement"][1] == pytest.approx(float(agree))
    places = [place for answer in documents[1].answers for place in answer]
    right = [int(sparse[place].argmax()) == documents[1].tokens[place] for place in places]
    assert measured["recalled"][1] == pytest.approx(sum(right) / len(right))
    assert (dense["kl"], dense["agreement"], dense["sparsity_achieved"]) == ([0.0] * 3, [1.0] * 3, 0.0)
    assert measured["sparsity_achieved"] == pytest.approx(0.5)
    assert measured["layers_routed"] == 3

    record = record_of(measured, dense)
    assert record["kl_low"] <= record["kl"] <= record["kl_high"]
    assert record["recalled_lost"] == pytest.approx(sum(dense["recalled"]) / 3 - sum(measured["recalled"]) / 3)


def test_keeping_nearly_all_is_nearly_dense(llada, documents):
    comparison = Comparison(Reader(llada[0], MASK), documents)
    kl = [sum(comparison.measure(dataclasses.replace(HALF, sparsity=one), Policy())["kl"]) for one in (0.04, 0.5, 0.9)]
    assert 0 < kl[0] < kl[1] < kl[2]


@pytest.mark.parametrize(
    ("config", "policy", "reason"),
    [
        (
            HALF,
            Policy(dense_layers=(0, 1, 2)),
            r"no attention call was sparse \(1 dense: policy: dense layer 0; 1 dense",
        ),
        (HALF, Policy(min_length=600), "no attention call was sparse .* fewer keys than min_length=600"),
        (
            dataclasses.replace(HALF, sparsity=0.01),
            Policy(),
            "no attention call was sparse .3 dense: the budget keeps every key block",
        ),
    ],
)
def test_dense_runs_are_refused(llada, documents, config, policy, reason):
    with pytest.raises(DenseRunError, match=reason):
        Comparison(Reader(llada[0], MASK), documents).measure(config, policy)


def test_predictions_may_come_from_the_place_before(llada, documents, monkeypatch):
    found = Reader(llada[0], MASK)
    one = documents[0]
    monkeypatch.setattr(reader.Reader, "states", lambda self, tokens: torch.arange(512.0)[None, :, None])

    def logits(self, states):
        """Sure of the token behind the state's place."""
        out = torch.zeros(len(states), 4096)
        out[torch.arange(len(states)), torch.tensor([*one.tokens, 0])[states[:, 0].long() + 1]] = 9.0
        return out

    monkeypatch.setattr(reader.Reader, "logits", logits)
    assert find_shift(found, one) == 1


def make_study(llada, tmp_path, **changes):
    made = dataclasses.replace(SETUP, **changes)
    read = []
    study = Study(
        Reader(llada[0], MASK),
        llada[1],
        TEXT,
        [512],
        made,
        AnswerStore(tmp_path / "answers"),
        "abc",
        read.append,
    )
    return study, read


def test_cells_are_measured_once(llada, tmp_path):
    cells = [Cell(512), Cell(512, HALF), Cell(512, HALF, Policy(layer_sparsity=((1, 0.75),)), "mine")]
    study, read = make_study(llada, tmp_path)
    assert study.open_documents(cells) == 6
    records = [study.record(cell) for cell in cells]
    assert sum(read) == 6
    assert [one["name"] for one in records] == ["", "", "mine"]
    assert records[2]["sparsity_achieved"] == pytest.approx(1.75 / 3)
    again, read = make_study(llada, tmp_path)
    assert again.open_documents(cells) == 0
    assert [again.record(cell) for cell in cells] == records
    assert read == []
    other, _ = make_study(llada, tmp_path, seed=1)
    assert other.open_documents(cells) == 6
    with pytest.raises(DenseRunError, match=r"512 tokens, clusters, sparsity 0\.01: no attention call was sparse"):
        study.measure(Cell(512, dataclasses.replace(HALF, sparsity=0.01)))


def test_layers_alone(llada, tmp_path):
    study, _ = make_study(llada, tmp_path)
    cells = study.layer_cells(512, HALF, Policy(dense_layers=(-1,)))
    assert [(cell.layer, cell.config.sparsity) for cell in cells] == [(0, 0.75), (0, 0.5), (1, 0.75), (1, 0.5)]
    costs = costs_of(study.layer_records(cells))
    assert [one.kept for one in costs] == pytest.approx([0.25, 0.5, 0.25, 0.5])
    assert costs[0].cost > costs[1].cost > 0
    with pytest.raises(DenseRunError, match="no layer is left to be sparse"):
        study.layer_records([])


def test_lengths_beyond_the_positions(llada, tmp_path):
    with pytest.raises(ValueError, match="--lengths must be within the 2048 positions of the model, got 4096"):
        Study(Reader(llada[0], MASK), llada[1], TEXT, [512, 4096], SETUP, AnswerStore(tmp_path))
