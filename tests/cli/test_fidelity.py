"""`baatt evaluate fidelity`: runs that go on, profiles, and refusals."""

import json

import pytest

from baatt import Policy
from baatt.assets import held_out_text
from baatt.cli import fidelity
from baatt.cli.main import main
from baatt.lab.answers import AnswerStore
from tests.lab.fidelity.models import llada_folder, transformers_folder

SMALL = ["--documents", "2", "--needles", "3", "--block-size", "16"]


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    return str(llada_folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in; the text is shorter, since all of it is made into tokens by every run."""
    monkeypatch.setattr(fidelity, "held_out_text", lambda: held_out_text()[:40_000])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(model, *more):
    return ["evaluate", "fidelity", "--model", model, *SMALL, *more]


def stored(here, name="fidelity.json"):
    return json.loads((here / name).read_text())


def test_ctrl_c_says_what_is_kept(llada, here, capsys, monkeypatch):
    put = AnswerStore.put

    def cut(store, key, answer):
        put(store, key, answer)
        if len(store) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerStore, "put", cut)
    assert main(command(llada, "--lengths", "512")) == 130
    assert "baatt: interrupted: 3 measurements in fidelity.answers are kept; the same" in capsys.readouterr().err


def test_lengths_scores_and_sparsities(llada, here, capsys):
    pytest.importorskip("matplotlib")
    options = ["--lengths", "512,1K", "--score", "clusters,exact", "--sparsity", "0.5,0.9"]
    assert main(command(llada, *options, "--plot", "f.png")) == 0
    out = capsys.readouterr().out
    assert "tiny, documents: 2, 1024 tokens each, float32" in out
    assert "Records: fidelity.json, measurements: fidelity.answers" in out
    assert (here / "f.png").stat().st_size > 10_000
    found = stored(here)
    assert {"command", "commit", "device", "versions", "weights"} <= found.keys()
    fixed = {
        "study": "fidelity", "model": "tiny", "predicts": "masked tokens", "documents": 2, "needles": 3, "seed": 0,
        "mask_share": 0.15, "dtype": "float32", "impl": "auto", "text": "heldout.txt",
    }  # fmt: skip
    assert fixed.items() <= found.items()
    places = [(one["length"], one["config"].get("score"), one["config"].get("sparsity")) for one in found["records"]]
    settings = [(None, None), *((score, sparsity) for sparsity in (0.5, 0.9) for score in ("clusters", "exact"))]
    assert places == [(length, *setting) for length in (512, 1024) for setting in settings]
    for one in found["records"][1:]:
        assert one["kl_low"] <= one["kl"] <= one["kl_high"]
        assert len(one["recalled_of_documents"]) == 2

    # A later run takes what is there, and measures what is new.
    lines = (here / "fidelity.answers/rank0.jsonl").read_text().splitlines()
    assert main(command(llada, *options, "--batch-size", "1", "--dense-layers", "0")) == 0
    assert len((here / "fidelity.answers/rank0.jsonl").read_text().splitlines()) == len(lines) + 8
    assert stored(here)["records"][0] == found["records"][0]
    assert stored(here)["records"][1]["policy"]["dense_layers"] == [0]


def test_a_profile_is_measured_saved_and_used(llada, here, capsys):
    options = ["--lengths", "512", "--sparsity", "0.75"]
    assert main(command(llada, *options, "--by-layer", "--save", "mine.json")) == 0
    out = capsys.readouterr().out
    assert "KL at 87.5 %" in out
    assert "Profile: mine.json, for --policy and Policy.load" in out
    found = stored(here)
    assert [one["layer"] for one in found["layers"]] == [layer for layer in range(3) for _ in range(3)]
    profile = Policy.load("mine.json")
    assert profile == Policy(
        dense_layers=tuple(found["profile"]["dense_layers"]),
        layer_sparsity=tuple(map(tuple, found["profile"]["layer_sparsity"])),
    )
    dense, uniform, other = found["records"]
    assert (dense["config"], uniform["name"], other["name"]) == ({}, "", "profile")
    assert other["sparsity_achieved"] == pytest.approx(uniform["sparsity_achieved"], abs=0.02)

    assert main(command(llada, *options, "--policy", "mine.json", "--json", "used.json")) == 0
    used = stored(here, "used.json")["records"]
    assert [one["name"] for one in used] == ["", "", "mine.json"]
    assert used[2]["kl_of_documents"] == other["kl_of_documents"]


def test_a_masked_model_of_transformers(here, capsys):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "EuroBertForMaskedLM"):
        pytest.skip("this version has no EuroBERT")
    options = {"num_key_value_heads": 2, "mask_token_id": 1}
    folder = str(transformers_folder(here / "euro", "EuroBertForMaskedLM", **options))
    Policy(layer_sparsity=((0, 0.75),)).save("mine.json")
    asked = ["--lengths", "512", "--sparsity", "0.5", "--needles", "0", "--policy", "mine.json"]
    assert main(command(folder, *asked)) == 0
    assert "stayed dense" not in capsys.readouterr().err
    dense, sparse, own = stored(here)["records"]
    assert [one["sparsity_achieved"] for one in (sparse, own)] == pytest.approx([0.5, 0.625])
    assert dense["kl"] == 0 < sparse["kl"]
    assert "recalled" not in sparse
    assert sparse["reasons"] == {}
    assert "transformers" in stored(here)["versions"]


def test_a_causal_model_of_transformers(here):
    pytest.importorskip("transformers")
    folder = str(transformers_folder(here / "qwen", "Qwen2ForCausalLM", num_key_value_heads=2))
    assert main(command(folder, "--lengths", "512", "--sparsity", "0.2,0.9", "--batch-size", "2")) == 0
    found = stored(here)
    assert found["predicts"] == "the tokens of the second half"
    dense, few, many = found["records"]
    assert 0 < few["kl"] < many["kl"]
    assert few["sparse_calls"] == 2
    assert 0 < few["sparsity_achieved"] < 0.2 < many["sparsity_achieved"] < 0.9  # the diagonal is always kept
    assert dense["agreement"] == 1 > few["agreement"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--needles", "99"], "--needles must be at most 28, got 99"),
        (["--mask-share", "1"], "--mask-share must be between 0 and 1, got 1"),
        (["--score", "best"], "--score must be one of"),
        (["--sparsity", "0"], "--sparsity must be above 0: dense attention is measured anyway"),
        (["--gguf", "x.gguf"], "--gguf must name a file in the folder --model, got 'x.gguf'"),
        (["--by-layer"], "--by-layer must have one of --lengths, one --sparsity, one --score and no --policy"),
        (["--lengths", "4K"], "--lengths must be within the 2048 positions of the model, got 4096"),
        (["--lengths", "64"], "--lengths must have room for 3 facts and their questions, got 64 tokens"),
        (["--documents", "999"], "the text must have 999 x 512 tokens for documents that differ, got"),
        (["--policy", "bad.json"], "bad.json must hold fields of Policy among"),
        (
            ["--dense-layers", "0,1,2"],
            "512 tokens, clusters, sparsity 0.5: no attention call was sparse (1 dense: policy",
        ),
        (["--save", "x.json"], "--save needs --by-layer, whose profile it names, got x.json"),
        (["--plot", "x.jpg"], "--plot must end in .png, got 'x.jpg'"),
    ],
)
def test_refusals(llada, here, capsys, options, message):
    (here / "bad.json").write_text('{"sparsity": 0.5}')
    given = ["--lengths", "512"] if "--lengths" not in options else []
    assert main(command(llada, *given, *options)) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_not_there(here, capsys):
    assert main(command("nowhere", "--lengths", "512")) == 2
    assert capsys.readouterr().err.startswith("baatt: nowhere: no such folder")
