"""A run of RULER on a tiny random model: keys, answers, samples drawn ahead, what is open, and the summary."""

import dataclasses
import json
import random
import shutil

import pytest
import torch

from baatt.config import BAAttConfig, Policy
from baatt.integrations.enable import enable
from baatt.lab.answers import AnswerStore
from baatt.lab.chat import load_chat_templates
from baatt.lab.options import variants
from baatt.lab.prompts import answer_text, pad_left
from baatt.lab.ranks import Ranks
from baatt.lab.ruler.cells import Cell, choose_tasks, make_cells
from baatt.lab.ruler.model import RulerAnswer, RulerModel, RulerSetup, checksums, shortened, source_digest
from baatt.lab.ruler.run import Run, same_everywhere
from baatt.lab.ruler.scoring import METRICS
from baatt.lab.ruler.sources import Sources
from baatt.lab.ruler.summary import compare, make_averages, make_records
from baatt.lab.ruler.tasks import OFFLINE_TASKS, check_sources, draw_samples
from baatt.lab.statistics import average_interval, bounded_interval, mcnemar_p, score_interval, wilson_interval
from baatt.models import MaskedDiffusionLM
from baatt.models.checkpoint import load_tokenizer
from baatt.sampling import SamplerConfig, generate
from tests.lab.lm_eval.harness import tiny_folder

SAMPLER = SamplerConfig(steps=8, gen_length=32, block_length=16, stop_at_eos=True)
STAMP = {"commit": "c" * 40, "device": "here"}
POLICY = Policy(dense_layers=(0,))
CONFIGS = variants(BAAttConfig(block_size=16), {"sparsity": [0.5, 0.75]})
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"The {colour} house is large. " * 5,
                    "qas": [{"question": "Which?", "is_impossible": False, "answers": [{"text": colour}]}],
                }
                for colour in ("red", "green")
            ]
        }
    ]
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny", n_layers=3)


@pytest.fixture(scope="module")
def setup(folder):
    return RulerSetup(checksums(folder), seed=1)


@pytest.fixture
def make(folder, setup):
    def asked(**changes):
        model, tokenizer = MaskedDiffusionLM.from_pretrained(folder), load_tokenizer(folder)
        changed = dataclasses.replace(setup, **changes)
        return RulerModel(model, tokenizer, changed, load_chat_templates(folder), STAMP)

    return asked


def cells_of(*tasks, length=512, policy=POLICY):
    return make_cells(tasks, [length], CONFIGS, [policy], [SAMPLER])


def run(model, store, cells, numbers=range(3), workers=0, shuffle=None):
    """Answers of every cell, and how many of each cell were asked."""
    asked = []
    share = Run(model, store, cells, numbers, workers)
    share.answer(lambda cell, count: asked.append((cell, count)), shuffle)
    return share.gather(Ranks()), asked


# --- what an answer depends on ---------------------------------------------------------------------------------------


def test_keys(setup):
    dense, sparse, sparser = cells_of("niah_single_1")
    keys = setup.keys(sparse, range(3))
    assert len(set(keys.values())) == 3
    assert {number: key for number, key in setup.keys(sparse, range(9)).items() if number < 3} == keys
    changes = [
        {"files": {"model.safetensors": "other"}}, {"dtype": "bfloat16"}, {"seed": 2}, {"batch_size": 2},
        {"sources": Sources(words="full")}, {"chat": True}, {"impl": "reference"},
    ]  # fmt: skip
    for change in changes:
        changed = dataclasses.replace(setup, **change)
        assert changed.keys(sparse, [0]) != setup.keys(sparse, [0]), change
        assert (changed.keys(dense, [0]) == setup.keys(dense, [0])) == ("impl" in change)
    cells = [dense, sparse, sparser, *cells_of("niah_single_1", length=700), *cells_of("niah_single_2")]
    cells.append(sparse._replace(config=dataclasses.replace(sparse.config, score="oracle")))
    cells.append(sparse._replace(policy=Policy()))
    cells += [cell._replace(sampler=dataclasses.replace(SAMPLER, threshold=0.9)) for cell in (dense, sparse)]
    assert len({setup.keys(cell, [0])[0] for cell in cells}) == len(cells)


def test_checksums_are_of_contents(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    (copy / "README.md").write_text("nothing an answer depends on")
    assert checksums(copy) == checksums(folder)
    (copy / "tokenizer_config.json").write_text("{}")
    changed = {name for name, one in checksums(copy).items() if one != checksums(folder)[name]}
    assert changed == {"tokenizer_config.json"}


def test_a_source_counts_where_it_is_used(tmp_path):
    for name, text in (("a", "One two."), ("b", "One two."), ("c", "Three.")):
        (tmp_path / f"{name}.txt").write_text(text)
    a, b, c = (Sources(essay=tmp_path / f"{name}.txt") for name in "abc")
    assert source_digest("vt", a) == source_digest("vt", b) != source_digest("vt", c)
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    with_squad = dataclasses.replace(a, squad=tmp_path / "squad.json")
    assert source_digest("vt", a) == source_digest("vt", with_squad) != source_digest("qa_1", with_squad)


def test_cells_that_would_run_the_same_are_kept_once():
    values = {"score": ["covariance", "covariance-8", "oracle"], "beta": [0.0, 0.5], "sort": ["none", "qk"]}
    configs = variants(BAAttConfig(), values | {"segment": [256, None]})
    cells = make_cells(["a", "b"], [512], configs)
    # beta counts for the scores that read it, the segment where something is sorted.
    assert len(cells) == len(set(cells)) == 2 * (1 + 2 * 2 * (1 + 2) + (1 + 2))
    assert cells[0] == Cell("a", 512)
    assert cells[0].options == {}
    assert {cell.task for cell in cells[:16]} == {"a"}
    assert cells[1].options == {**cells[1].options, "score": "covariance", "segment": None, "beta": 0.0}
    assert {cell.options["beta"] for cell in cells[1:] if cell.options.get("score") == "covariance-8"} == {0.0, 0.5}
    assert {cell.options["beta"] for cell in cells[1:] if cell.options.get("score") == "oracle"} == {0.0}


def test_every_sampler_has_dense_attention_of_its_own():
    samplers = variants(SAMPLER, {"cache": ["none", "dual"]})
    policies = variants(Policy(), {"dense_layers": [(), (0,)]})
    cells = make_cells(["a"], [512], [BAAttConfig()], policies, samplers)
    assert [(cell.sampler.cache, cell.config is None, cell.dense_layers) for cell in cells] == [
        (cache, *rest) for cache in ("none", "dual") for rest in ((True, []), (False, []), (False, [0]))
    ]
    scores = [[1.0], [0.0], [1.0], [0.0], [1.0], [0.0]]
    records = make_records(cells, [made(each) for each in scores])
    assert [one["dense_accuracy"] for one in records] == [1, 1, 1, 0, 0, 0]
    assert [one["sampler"]["cache"] for one in records] == ["none"] * 3 + ["dual"] * 3
    averages = [one["by_length"][0] for one in make_averages(records)]
    assert [(one["accuracy"], one["dense_accuracy"]) for one in averages] == [
        (1, 1),
        (0, 1),
        (1, 1),
        (0, 0),
        (1, 0),
        (0, 0),
    ]


def test_tasks(tmp_path):
    assert choose_tasks("all", Sources()) == list(OFFLINE_TASKS)
    assert choose_tasks("all", Sources(squad=tmp_path)) == [*OFFLINE_TASKS, "qa_1"]
    assert choose_tasks("vt,needles,vt", Sources()) == ["vt", *OFFLINE_TASKS[:8]]
    with pytest.raises(ValueError, match=r"tasks must be all, needles or of niah_single_1,.*; got sudoku,go"):
        choose_tasks("vt,sudoku,go", Sources())
    with pytest.raises(ValueError, match="tasks must have their data sets: qa_2 needs --hotpot FILE, got none"):
        choose_tasks("qa_2", Sources())
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    sources = Sources(squad=tmp_path / "squad.json")
    check_sources(("qa_1", "vt"), sources, 2)
    with pytest.raises(ValueError, match="count must be at most 2, the questions that qa_1 has, got 3"):
        check_sources(("qa_1", "vt"), sources, 3)


# --- answers ---------------------------------------------------------------------------------------------------------


def sampled(model, cell, samples):
    """Texts and scores of samples answered together, put together from the parts that a reader of the docs has."""
    tokenizer = model.tokenizer
    rows = [tokenizer.encode(sample.prompt + sample.answer_prefix).ids for sample in samples]
    prompts, sampler = pad_left(rows, 0), shortened(cell.sampler, max(one.answer_tokens for one in samples))
    if cell.config is None:
        result = generate(model.model, *prompts, sampler)
    else:
        with enable(model.model, cell.config, cell.policy) as handle:
            result = generate(model.model, *prompts, sampler, on_step=handle.at_step)
    texts = [answer_text(tokenizer, row[:128], {0}) for row in result.tokens.tolist()]
    return [(text, METRICS["all"](text, sample.values)) for text, sample in zip(texts, samples, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_answers_are_those_of_the_sampler(make, batch_size):
    model = make(batch_size=batch_size)
    cells = cells_of("niah_multivalue")
    found, asked = run(model, AnswerStore(None), cells)
    assert [count for _, count in asked] == ([1] * 9 if batch_size == 1 else [2, 1] * 3)
    samples = draw_samples("niah_multivalue", 512, 3, model.tokenizer, seed=1)
    for cell, answers in zip(cells, found, strict=True):
        parts = [samples[first : first + batch_size] for first in range(0, 3, batch_size)]
        assert [(one.text, one.score) for one in answers] == [
            pair for part in parts for pair in sampled(model, cell, part)
        ]
        assert [one.values for one in answers] == [list(sample.values) for sample in samples]
        assert [one.number for one in answers] == [0, 1, 2]
        assert all(one.seconds > 0 and 0 < one.tokens <= 32 and one.evaluations <= 8 for one in answers)
        assert all(one.text_tokens <= 32 and one.cached_evaluations == 0 and one.exact is False for one in answers)
        assert {(one.commit, one.device) for one in answers} == {("c" * 40, "here")}
    assert found[0][0].setting == {}
    assert found[1][0].setting == cells[1].options | {"dense_layers": [0]}
    assert {one.sparsity for one in found[0]} == {0.0}
    # One of three layers is dense; a number of blocks is rounded up.
    assert all(2 / 3 * 0.73 < one.sparsity <= 2 / 3 * 0.75 for one in found[2])
    assert len({one.text for answers in found for one in answers}) > 1


def test_any_order_of_batches_gives_the_same_answers(make):
    cells = cells_of("niah_single_1", "niah_single_2")
    (found, asked), (other, shuffled) = (
        run(make(), AnswerStore(None), cells, shuffle=order) for order in (None, random.Random(0))
    )
    assert [[one.text for one in answers] for answers in found] == [[one.text for one in answers] for answers in other]
    assert shuffled != asked
    assert sorted(map(str, shuffled[:9])) == sorted(map(str, asked[:9]))


def test_attention_mass_is_kept_beside_the_answers(make, tmp_path):
    model, store = make(), AnswerStore(tmp_path)
    (dense, half, less) = cells_of("niah_single_1")
    oracle = half._replace(config=dataclasses.replace(half.config, score="oracle", beta=0.0))
    everywhere = half._replace(policy=Policy(dense_layers=(0, 1, 2)))
    cells = [dense, half, less, oracle, everywhere]
    run(model, store, cells, range(2))
    Run(model, store, cells, range(2), recalls=1).measure_recalls()
    assert Run(model, AnswerStore(tmp_path), cells, range(2), recalls=1).open_recalls() == {}
    gathered = Run(model, AnswerStore(tmp_path), cells, range(2), recalls=2).gather(Ranks())
    recalls = [[one.recall for one in answers] for answers in gathered]
    assert all(second is None for _, second in recalls)
    assert recalls[0][0] is recalls[4][0] is None
    means = [recalls[place][0][0] for place in (1, 2, 3)]
    assert 0 < means[1] < means[0] <= means[2] < 1
    kept = [one.get("recall_mean") for one in make_records(cells, gathered)]
    assert kept == [None, *means, None]
    plain = Run(model, store, cells, range(2)).gather(Ranks())
    assert all(one.recall is None for answers in plain for one in answers)


def test_chat(make):
    plain, chat = make(), make(chat=True)
    assert plain.reserve == 0 < chat.reserve < 64
    ids = chat.ids("The prompt?", " The answer", chat=True)
    text = "<|user|>The prompt?<|endoftext|><|assistant|>The answer"
    assert ids == chat.tokenizer.encode(text).ids
    assert plain.ids("The prompt?", " The", chat=False) == plain.tokenizer.encode("The prompt? The").ids
    chat.check("niah_multikey_1", 512)
    (sample,) = draw_samples("niah_multikey_1", 512, 1, chat.tokenizer, seed=1, reserve=chat.reserve)
    assert len(chat.ids(sample.prompt, sample.answer_prefix, chat=True)) + 128 <= 512
    (answers,), _ = run(chat, AnswerStore(None), cells_of("niah_multikey_1")[:1], range(1))
    assert answers[0].values == list(sample.values)
    chat.reserve = 0
    with pytest.raises(ValueError, match="niah_multikey_1 with its chat template must have at most 512 tokens, got 5"):
        chat.check("niah_multikey_1", 512)


def test_a_beginning_of_text_is_not_doubled(make):
    model = make()
    model._templates = model._templates._replace(special_tokens={"bos_token": "<|endoftext|>"})
    model.tokenizer.post_processor = None
    assert model.ids("<|endoftext|>a", "b", chat=False)[0] == 0


def test_a_model_without_template(folder, setup, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tokenizer_config.json").unlink()
    model, tokenizer = MaskedDiffusionLM.from_pretrained(copy), load_tokenizer(copy)
    RulerModel(model, tokenizer, setup, load_chat_templates(copy), STAMP)
    with pytest.raises(ValueError, match="must have a chat template"):
        RulerModel(model, tokenizer, dataclasses.replace(setup, chat=True), load_chat_templates(copy), STAMP)


def test_what_does_not_fit_is_refused(make):
    with pytest.raises(ValueError, match=r"length must hold the smallest vt sample \(\d+ tokens\), got 512"):
        make().check("vt", 512)
    with pytest.raises(ValueError, match=r"dense_layers must lie in \[-3, 3\)"):
        make().warm_up(cells_of("vt", policy=Policy(dense_layers=(3,)))[1])
    share = Run(make(), AnswerStore(None), cells_of("niah_single_1"), range(1))
    share.prepare()
    with pytest.raises(RuntimeError, match="impl='hopper' cannot run"):
        dataclasses.replace(share, model=make(impl="hopper")).prepare()


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was_cut(make, tmp_path):
    model, cells = make(), cells_of("niah_single_1", "niah_multiquery")
    first, asked = run(model, AnswerStore(tmp_path), cells)
    assert len(asked) == 18
    lines = (tmp_path / "rank0.jsonl").read_bytes().splitlines(keepends=True)
    assert json.loads(lines[0])["answer"]["number"] == 0
    (tmp_path / "rank0.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:40])
    again, asked = run(model, AnswerStore(tmp_path), cells)
    assert [cell for cell, _ in asked] == [cells[2]] * 2 + [cell for cell in cells[3:] for _ in range(3)]
    texts = [[one.text for one in answers] for answers in first]
    assert [[one.text for one in answers] for answers in again] == texts
    assert run(model, AnswerStore(tmp_path), cells) == (again, [])


def test_more_settings_and_samples_reuse_what_is_there(make, tmp_path):
    cells = cells_of("niah_single_1")
    run(make(), AnswerStore(tmp_path), cells[:2], range(2))
    _, asked = run(make(), AnswerStore(tmp_path), cells, range(2))
    assert [cell for cell, _ in asked] == [cells[2]] * 2
    _, asked = run(make(), AnswerStore(tmp_path), cells)
    assert [cell for cell, _ in asked] == cells
    others = cells_of("niah_single_1", policy=Policy())
    _, asked = run(make(), AnswerStore(tmp_path), others)
    assert [cell for cell, _ in asked] == [others[1]] * 3 + [others[2]] * 3
    _, asked = run(make(seed=3), AnswerStore(tmp_path), cells[:1])
    assert len(asked) == 3


@pytest.mark.usefixtures("forked_workers")
def test_only_missing_samples_are_drawn_ahead(make, tmp_path):
    model = make()
    cells = [cell for task in ("niah_single_1", "niah_single_2", "niah_single_3") for cell in cells_of(task)]
    store = AnswerStore(tmp_path)
    run(model, store, cells[:2], [1])
    share = Run(model, store, cells, range(3))
    places = share.open()
    assert places["niah_single_1", 512] == {cells[0]: [0, 2], cells[1]: [0, 2], cells[2]: [0, 1, 2]}
    del places["niah_single_1", 512][cells[2]]
    here = list(share.draw(places))
    assert [sorted(samples) for samples in here] == [[0, 2], [0, 1, 2], [0, 1, 2]]
    assert here[1] == dict(enumerate(draw_samples("niah_single_2", 512, 3, model.tokenizer, seed=1)))
    assert list(dataclasses.replace(share, workers=2).draw(places)) == here


def test_processes_that_differ_are_noticed(setup, monkeypatch):
    alone = Ranks()
    assert same_everywhere(setup, cells_of("vt"), 3, alone)
    monkeypatch.setattr(alone, "all_gather", lambda x: torch.stack((x, x + 1)))
    assert not same_everywhere(setup, cells_of("vt"), 3, alone)


# --- summary ---------------------------------------------------------------------------------------------------------


def made(scores, whole=None, **changes):
    """Answers of one cell with these scores."""
    fields = {
        "task": "t", "length": 512, "setting": {}, "text": "", "values": [], "seconds": 2.0, "tokens": 10,
        "evaluations": 3, "sparsity": 0.25, **STAMP,
    }  # fmt: skip
    pairs = zip(scores, whole or scores, strict=True)
    return [RulerAnswer(number=n, score=a, whole=b, **fields | changes) for n, (a, b) in enumerate(pairs)]


def test_records():
    cells = make_cells(["a", "b"], [512], [BAAttConfig()], [Policy(dense_layers=(0, 1))])
    right = [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]
    shares = [1.0, 0.75, 1.0, 0.5], [0.5, 0.75, 0.0, 0.5]
    answers = [made(right[0]), made(right[1], [0.0, 0.0, 0.0, 1.0]), made(shares[0]), made(shares[1])]
    answers[1][0] = answers[1][0]._replace(commit="d", device="there")
    dense, sparse, dense_share, share = make_records(cells, answers)
    assert (dense["config"], dense["dense_layers"]) == ({}, [])
    assert (sparse["config"], sparse["dense_layers"]) == (cells[1].options, [0, 1])
    assert (sparse["task"], sparse["length"], sparse["n"], sparse["study"]) == ("a", 512, 4, "ruler")
    assert (sparse["accuracy"], sparse["accuracy_whole"], sparse["dense_accuracy"]) == (0.5, 0.25, 0.75)
    assert (sparse["ci_low"], sparse["ci_high"]) == wilson_interval(2, 4)
    assert (sparse["only_dense_right"], sparse["only_sparse_right"]) == (2, 1)
    assert sparse["mcnemar_p"] == mcnemar_p([1, 1, 1, 0], [0, 0, 1, 1])
    assert (sparse["difference"], sparse["difference_low"], sparse["difference_high"]) == (-0.25, None, None)
    assert (sparse["seconds_per_answer"], sparse["tokens_per_second"]) == (2.0, 5.0)
    assert (sparse["sparsity_achieved"], sparse["evaluations_per_answer"]) == (0.25, 3)
    assert (sparse["scores"], sparse["scores_whole"]) == (right[1], [0.0, 0.0, 0.0, 1.0])
    assert (sparse["commits"], sparse["devices"]) == (["d", "c" * 40], ["there", "here"])
    assert (dense["difference"], dense["mcnemar_p"]) == (0, 1)
    assert (share["ci_low"], share["ci_high"]) == bounded_interval(shares[1], 0, 1)
    assert (share["difference_low"], share["difference_high"]) == bounded_interval([-0.5, 0.0, -1.0, 0.0], -1, 1)
    assert (share["difference"], share["mcnemar_p"], share["only_dense_right"]) == (-0.375, None, None)
    assert json.loads(json.dumps([dense, sparse, dense_share, share])) == [dense, sparse, dense_share, share]


def test_averages():
    cells = make_cells(["a", "b"], [512, 1024], [BAAttConfig()])
    scores = [[1.0, 1.0], [1.0, 0.0], [1.0, 0.5], [0.0, 0.5], *[[1.0, 1.0]] * 2, *[[1.0, 0.0]] * 2]
    records = make_records(cells, [made(each) for each in scores])
    dense, sparse = make_averages(records)
    assert (dense["config"], sparse["config"], sparse["tasks"]) == ({}, cells[1].options, ["a", "b"])
    assert [one["length"] for one in sparse["by_length"]] == [512, 1024]
    assert [one["accuracy"] for one in dense["by_length"]] == [0.875, 0.75]
    short, long = sparse["by_length"]
    assert (short["accuracy"], short["dense_accuracy"], short["difference"]) == (0.375, 0.875, -0.5)
    own = [(one["accuracy"], one["ci_low"], one["ci_high"]) for one in (records[1], records[3])]
    assert (short["ci_low"], short["ci_high"]) == average_interval(own)
    # Rows of equal averages tell a bootstrap nothing: each task's own limits do, added as independent errors are.
    lost, other = ((-0.5, *bounded_interval(one, -1, 1)) for one in ([0.0, -1.0], [-1.0, 0.0]))
    assert (short["difference_low"], short["difference_high"]) == average_interval([lost, other], least=-1)
    same = (0.0, *bounded_interval([0.0, 0.0], -1, 1))
    assert (long["difference_low"], long["difference_high"]) == average_interval([same, same], least=-1)
    assert average_interval([same, same], least=-1).high < same[2]
    assert sparse["mean"] == (0.375 + 0.75) / 2
    assert sparse["rising"] == pytest.approx((0.375 + 2 * 0.75) / 3)
    assert sparse["falling"] == pytest.approx((2 * 0.375 + 0.75) / 3)


def test_intervals():
    assert score_interval([1.0, 1.0]) == wilson_interval(2, 2)
    assert score_interval([1.0, 0.5]) == bounded_interval([1.0, 0.5], 0, 1)
    low, high = average_interval([(1.0, 0.7, 1.0), (0.5, 0.1, 0.9)])
    assert (low, high) == (pytest.approx(0.75 - 0.25), pytest.approx(0.75 + 0.2))
    assert average_interval([(0.5, 0.25, 0.75)]) == (0.25, 0.75)
    with pytest.raises(ValueError, match="both must answer the same samples, got 1 and 2"):
        compare([1.0], [1.0, 0.0])
