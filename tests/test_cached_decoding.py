"""Decoding with a prefix or dual cache against a hand-written one, and what caches may not change."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import baatt
from baatt import BAAttConfig
from baatt.assets import shipped_model
from baatt.cli.generate import EXAMPLE
from baatt.cli.main import main
from baatt.config import Policy
from baatt.integrations.enable import enable
from baatt.integrations.handle import Handle, NoSparseAttentionWarning
from baatt.lab.ruler.cells import Cell
from baatt.lab.ruler.model import RulerModel
from baatt.lab.ruler.tasks import draw_samples
from baatt.models import MaskedDiffusionLM, ModelConfig
from baatt.models.checkpoint import load_tokenizer
from baatt.sampling import CACHES, SamplerConfig, SampleResult, generate
from baatt.sampling.config import Span
from baatt.stages.dense import dense_attention

MASK, VOCABULARY = 17, 19  # the mask token lies inside the vocabulary, as LLaDA's does
ALLOWED = [token for token in range(VOCABULARY) if token != MASK]
CONFIG = ModelConfig(
    d_model=32, n_heads=4, n_kv_heads=2, n_layers=3, mlp_hidden_size=48, vocab_size=VOCABULARY, embedding_size=24,
    mask_token_id=MASK, eos_token_id=7,
)  # fmt: skip
LENGTHS = [5, 11, 8]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small spend their time waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(seed: int = 0, **changes: Any) -> MaskedDiffusionLM:
    torch.manual_seed(seed)
    model = MaskedDiffusionLM(dataclasses.replace(CONFIG, **changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.35)
    return model


def make_prompt(length: int, seed: int = 1) -> list[int]:
    drawn: list[int] = torch.randint(0, MASK, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return drawn


def padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left with a token that means something, and their mask."""
    width = max(map(len, prompts))
    ids = torch.tensor([[3] * (width - len(prompt)) + prompt for prompt in prompts])
    return ids, torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])


# --- a hand-written decoder ------------------------------------------------------------------------------------------

Held = list[tuple[dict[int, Tensor], dict[int, Tensor]]]  # keys and values of every layer, by place


def naive_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt() * weight


def naive_rope(x: Tensor, places: list[int]) -> Tensor:
    """x [n, heads, D] turned by the place of each row."""
    half = x.shape[-1] // 2
    angles = torch.tensor(places).double()[:, None, None] * CONFIG.rope_theta ** (-torch.arange(half) / half).double()
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def naive_pass(model: MaskedDiffusionLM, tokens: list[int], first: int, length: int, held: Held) -> Tensor:
    """Logits [n, V] of tokens at places `first`, `first` + 1, ... of one sequence; their keys and values are held."""
    config, state = model.config, model.state_dict()
    size, group = config.head_size, config.n_heads // config.kv_heads
    x = state["model.transformer.wte.weight"][tokens]
    for layer, (keys, values) in enumerate(held):
        part = {
            name.removeprefix(f"model.transformer.blocks.{layer}.").removesuffix(".weight"): weight
            for name, weight in state.items()
        }
        normed = naive_norm(x, part["attn_norm"])
        q, k, v = ((normed @ part[name].T).unflatten(-1, (-1, size)) for name in ("q_proj", "k_proj", "v_proj"))
        places = [first + row for row in range(len(tokens))]
        q, k = naive_rope(q, places), naive_rope(k, places)
        keys.update(zip(places, k, strict=True))
        values.update(zip(places, v, strict=True))
        all_keys = torch.stack([keys[place] for place in range(length)])
        all_values = torch.stack([values[place] for place in range(length)])
        out = torch.zeros_like(q)
        for head in range(config.n_heads):
            scores = q[:, head] @ all_keys[:, head // group].T / math.sqrt(size)
            out[:, head] = scores.softmax(1) @ all_values[:, head // group]
        x = x + out.flatten(1) @ part["attn_out"].T
        normed = naive_norm(x, part["ff_norm"])
        gate = normed @ part["ff_proj"].T
        x = x + (gate * gate.sigmoid() * (normed @ part["up_proj"].T)) @ part["ff_out"].T
    final = naive_norm(x, state["model.transformer.ln_f.weight"])
    return final @ state["model.transformer.ff_out.weight"].T


class Naive:
    """One prompt at temperature 0, without padding: tokens, the step of each, evaluations full and cached."""

    def __init__(self, model: MaskedDiffusionLM, prompt: list[int], config: SamplerConfig) -> None:
        self.model, self.config, self.prompt = model, config, prompt
        self.ids = [*prompt, *[MASK] * config.gen_length]
        self.filled_at = [-1] * config.gen_length
        self.evaluations = [0, 0]
        for block in range(config.blocks):
            self.block(block)

    def block(self, block: int) -> None:
        config, length = self.config, len(self.ids)
        begin = len(self.prompt) + block * config.block_length
        places = range(begin, begin + config.block_length)
        held: list[Held] = [[({}, {}) for _ in range(self.model.config.n_layers)] for _ in range(2)]
        for inner in range(config.steps_per_block):
            masked = [place for place in places if self.ids[place] == MASK]
            if not masked:
                return
            first, last = (0, length) if inner == 0 else (begin, length if config.cache == "prefix" else places.stop)
            self.evaluations[inner > 0] += 1
            logits = naive_pass(self.model, self.ids[first:last], first, length, held[0])
            if config.cfg_scale > 0:
                blind = [MASK] * len(self.prompt) + self.ids[len(self.prompt) :]
                without = naive_pass(self.model, blind[first:last], first, length, held[1])
                logits = without + (config.cfg_scale + 1) * (logits - without)
            candidates = []
            for place in masked:
                probabilities = logits[place - first, ALLOWED].softmax(0)
                sure, index = probabilities.max(0)
                candidates.append((sure.item(), place, ALLOWED[int(index)]))
            candidates.sort(reverse=True)
            for _, place, token in candidates[: self.count(inner, [sure for sure, _, _ in candidates])]:
                self.ids[place] = token
                self.filled_at[place - len(self.prompt)] = block * config.steps_per_block + inner

    def count(self, inner: int, sure: list[float]) -> int:
        if self.config.threshold is not None:
            return max(1, sum(one > self.config.threshold for one in sure))
        share, remainder = divmod(self.config.block_length, self.config.steps_per_block)
        return share + (inner < remainder)

    @property
    def tokens(self) -> list[int]:
        return self.ids[len(self.prompt) :]


CASES = [
    {"steps": 12, "gen_length": 12, "block_length": 12},
    {"steps": 6, "gen_length": 12, "block_length": 4},
    {"steps": 6, "gen_length": 10, "block_length": 5},
    {"steps": 8, "gen_length": 12, "block_length": 6, "cfg_scale": 1.5},
    {"steps": 12, "gen_length": 12, "block_length": 6, "threshold": 0.3},
    {"steps": 12, "gen_length": 12, "block_length": 4, "threshold": 0.25, "cfg_scale": 0.5},
]


@pytest.mark.parametrize("heads", [2, pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_hand_written_decoder(case: dict[str, Any], cache: str, heads: int) -> None:
    """Each prompt by itself there, all of them padded in one batch here: rows that are done leave the cache."""
    model, config = make_model(n_kv_heads=heads), SamplerConfig(**case, cache=cache)
    prompts = [make_prompt(length, seed=length) for length in LENGTHS]
    expected = [Naive(model, prompt, config) for prompt in prompts]
    result = generate(model, *padded(prompts), config)
    assert result.tokens.tolist() == [one.tokens for one in expected]
    assert result.unmasked_at.tolist() == [one.filled_at for one in expected]
    single = generate(model, torch.tensor(prompts[:1]), None, config)
    assert single.tokens.tolist() == [expected[0].tokens]
    assert [single.full_evaluations, single.cached_evaluations] == expected[0].evaluations


def test_staleness_and_the_two_caches_matter() -> None:
    """What the test above compares is not the same as decoding without a cache, nor one cache the same as the other."""
    prompts = [make_prompt(length, seed=length) for length in range(3, 13)]
    found = [
        generate(make_model(), *padded(prompts), SamplerConfig(steps=6, gen_length=12, block_length=6, cache=cache))
        for cache in CACHES
    ]
    none, prefix, dual = (result.tokens for result in found)
    assert not torch.equal(none, prefix)
    assert not torch.equal(none, dual)
    assert not torch.equal(prefix, dual)


# --- where a cache is exact ------------------------------------------------------------------------------------------

EXACT = [
    {},
    {"cfg_scale": 1.0},
    {"threshold": 0.3},
    {"temperature": 1.0},
    {"remasking": "random"},
    {"remasking": "left_to_right", "threshold": 0.3},
    {"stop_at_eos": True, "threshold": 0.3},
]


def run(
    model: MaskedDiffusionLM, cache: str, case: dict[str, Any], sparse: BAAttConfig | None = None, **options: Any
) -> SampleResult:
    prompts = [make_prompt(length, seed=length) for length in LENGTHS]
    return run_sparse(model, prompts, SamplerConfig(**case, cache=cache), sparse, **options)


def run_sparse(
    model: MaskedDiffusionLM,
    prompts: list[list[int]],
    config: SamplerConfig,
    sparse: BAAttConfig | None,
    policy: Policy | None = None,
    watch: "Watch | None" = None,
) -> SampleResult:
    with enable(model, sparse, policy, impl="reference") as handle:
        if watch is not None:
            watch.handle = handle
            handle.watch(watch)
        return generate(model, *padded(prompts), config, on_step=handle.at_step)


@pytest.mark.parametrize("sparse", [None, BAAttConfig(block_size=16, sparsity=0.5)], ids=["dense", "sparse"])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("changes", EXACT, ids=str)
def test_one_step_a_block_is_exact(changes: dict[str, Any], cache: str, sparse: BAAttConfig | None) -> None:
    model, case = make_model(), {"steps": 3, "gen_length": 12, "block_length": 4, **changes}
    expected = run(model, "none", case, sparse=sparse)
    result = run(model, cache, case, sparse=sparse)
    assert torch.equal(result.tokens, expected.tokens)
    assert torch.equal(result.unmasked_at, expected.unmasked_at)
    assert (result.full_evaluations, result.cached_evaluations) == (expected.steps, 0)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("changes", EXACT, ids=str)
def test_a_single_layer_is_exact(changes: dict[str, Any], cache: str) -> None:
    """Its keys and values are functions of their own tokens, which change in the block alone: nothing is stale."""
    model, case = make_model(n_layers=1), {"steps": 12, "gen_length": 12, "block_length": 4, **changes}
    expected, result = run(model, "none", case), run(model, cache, case)
    assert torch.equal(result.tokens, expected.tokens)
    assert torch.equal(result.unmasked_at, expected.unmasked_at)
    assert result.steps == expected.steps
    assert result.cached_evaluations > 0
    assert expected.cached_evaluations == 0


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_the_last_step_of_a_block_does_not_disturb_the_next(cache: str) -> None:
    """Every block begins with a full pass: its first tokens are those of a run that starts there, uncached."""
    model, prompt = make_model(), make_prompt(9)
    config = SamplerConfig(steps=8, gen_length=8, block_length=4, cache=cache)
    result = generate(model, torch.tensor([prompt]), None, config)
    first = [*prompt, *result.tokens[0, :4].tolist()]
    rest = generate(model, torch.tensor([first]), None, dataclasses.replace(config, steps=4, gen_length=4))
    assert rest.tokens.tolist() == [result.tokens[0, 4:].tolist()]


# --- sparse attention ------------------------------------------------------------------------------------------------

SPARSE = BAAttConfig(block_size=16, sparsity=0.5)


class Watch:
    """What every attention call is given: (layer, dense?, queries, keys, rows)."""

    handle: Handle

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int, int, int]] = []  # with the number of sparse calls before

    def __call__(
        self,
        layer: int | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        scale: float,
        causal: int | None,
    ) -> None:
        assert causal is None
        assert layer is not None
        assert q.shape[1] == 4
        assert k.shape == v.shape
        assert k.shape[:2] == (len(q), 2)
        assert key_mask is None or key_mask.shape == (len(q), k.shape[2])
        self.seen.append((layer, self.handle.sparse_calls, q.shape[2], k.shape[2], len(q)))

    @property
    def calls(self) -> list[tuple[int, bool, int, int, int]]:
        """Dense is what did not add to the sparse calls."""
        after = [*(sparse for _, sparse, *_ in self.seen[1:]), self.handle.sparse_calls]
        return [(layer, before == now, *sizes) for (layer, before, *sizes), now in zip(self.seen, after, strict=True)]


@pytest.mark.parametrize(("cache", "queries"), [("prefix", [12, 12, 6, 6]), ("dual", [6, 6, 6, 6])])
@pytest.mark.parametrize("least", [0, 6, 7, 12, 13])
def test_the_policy_decides_from_how_many_queries_a_cached_step_is_sparse(
    cache: str, queries: list[int], least: int
) -> None:
    watch, policy = Watch(), Policy(min_queries=least, dense_layers=(1,))
    case = {"steps": 6, "gen_length": 12, "block_length": 6}
    run(make_model(), cache, case, sparse=SPARSE, policy=policy, watch=watch)
    expected = []
    for step in range(6):
        count = 23 if step % 3 == 0 else queries[step // 3 * 2 + step % 3 - 1]
        sparse = count == 23 or count >= least
        expected += [(layer, layer == 1 or not sparse, count, 23, 3) for layer in range(3)]
    assert watch.calls == expected


def test_first_steps_and_short_sequences_stay_dense_with_a_cache() -> None:
    case = {"steps": 6, "gen_length": 12, "block_length": 6}
    for policy, sparse_calls in ((Policy(dense_steps=0.5), 3), (Policy(min_length=24), 0), (Policy(min_length=23), 6)):
        watch = Watch()
        run(make_model(), "dual", case, sparse=SPARSE, policy=policy, watch=watch)
        assert sum(not dense for _, dense, *_ in watch.calls) == sparse_calls


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_zero_sparsity_equals_dense(cache: str) -> None:
    model, exact = make_model(), BAAttConfig(block_size=16, sparsity=0.0, segment=None, sort="qk")
    prompts = [make_prompt(length, seed=length) for length in (50, 37)]
    config = SamplerConfig(steps=12, gen_length=24, block_length=12, cache=cache)
    sparse = run_sparse(model, prompts, config, exact, Policy(min_queries=0))
    assert torch.equal(sparse.tokens, generate(model, *padded(prompts), config).tokens)


def test_sparse_cached_steps_use_the_whole_cache() -> None:
    """A block of 12 queries in the middle of 74 keys; half of the key blocks are left out."""
    model, watch = make_model(), Watch()
    prompts = [make_prompt(length, seed=length) for length in (50, 37)]
    config = SamplerConfig(steps=12, gen_length=24, block_length=12, cache="dual")
    sparse = run_sparse(model, prompts, config, SPARSE, Policy(min_queries=0), watch)
    assert {call[1:4] for call in watch.calls} == {(False, 74, 74), (False, 12, 74)}
    assert not torch.equal(sparse.tokens, generate(model, *padded(prompts), config).tokens)


# --- batches, guidance, ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_rows_that_are_done_are_left_out_of_the_cache(cache: str, cfg_scale: float) -> None:
    watch, case = Watch(), {"steps": 12, "gen_length": 12, "block_length": 6, "threshold": 0.3, "cfg_scale": cfg_scale}
    result = run(make_model(), cache, case, watch=watch)
    halves = 2 if cfg_scale else 1
    last = torch.stack([result.unmasked_at[:, :6].amax(dim=1), result.unmasked_at[:, 6:].amax(dim=1)])
    expected = [
        halves * int((last[block] >= block * 6 + inner).sum())
        for block in range(2)
        for inner in range(int(last[block].max()) - block * 6 + 1)
    ]
    assert [rows for layer, *_, rows in watch.calls if layer == 0] == expected
    assert len(set(expected)) > 1  # some row was done before the others


def test_ended_rows_are_not_evaluated_and_the_others_do_not_notice() -> None:
    model = make_model()
    with torch.no_grad():  # end-of-text is likely, not certain
        model.transformer.ff_out.weight[7] *= 2
    case = {"steps": 16, "gen_length": 16, "block_length": 4, "stop_at_eos": True}
    for cache in ("prefix", "dual"):
        together = run(model, cache, case)
        ended = (together.unmasked_at == -1).any(dim=1)
        assert int(ended.sum()) > 0
        for row, length in enumerate(LENGTHS):
            prompt = torch.tensor([make_prompt(length, seed=length)])
            alone = generate(model, prompt, None, SamplerConfig(**case, cache=cache))
            assert torch.equal(alone.tokens[0], together.tokens[row])
            assert alone.tokens_per_second == int((alone.unmasked_at >= 0).sum()) / alone.seconds


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_temperature_is_deterministic_given_the_seed(cache: str) -> None:
    model, case = make_model(), {"steps": 6, "gen_length": 12, "block_length": 6, "temperature": 1.0}
    first, again, other = (run(model, cache, {**case, "seed": seed}).tokens for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- counts, names, refusals -----------------------------------------------------------------------------------------


def test_evaluations_are_counted_by_kind() -> None:
    model, case = make_model(), {"steps": 12, "gen_length": 12, "block_length": 4}
    counts = {cache: run(model, cache, case) for cache in CACHES}
    assert [(one.full_evaluations, one.cached_evaluations, one.steps) for one in counts.values()] == [
        (12, 0, 12),
        (3, 9, 12),
        (3, 9, 12),
    ]
    for one in counts.values():
        assert one.tokens_per_second == 36 / one.seconds
    assert SampleResult(torch.zeros(1, 2), 3, 0.5, torch.zeros(1, 2)).full_evaluations == 3


def test_blocks_without_an_evaluation_are_not_counted() -> None:
    model = make_model(include_bias=True)
    with torch.no_grad():  # it knows nothing but end-of-text
        model.transformer.ln_f.weight.zero_()
        model.transformer.ff_out.bias[7] = 9
    result = run(model, "dual", {"steps": 8, "gen_length": 16, "block_length": 4, "stop_at_eos": True})
    assert (result.full_evaluations, result.cached_evaluations, result.filled) == (1, 1, 12)
    assert (result.tokens == 7).all()


def test_spans_of_the_caches() -> None:
    spans = {name: choose(Span(10, 14), 30) for name, choose in CACHES.items()}
    assert spans == {"none": (0, 30), "prefix": (10, 30), "dual": (10, 14)}


@pytest.mark.parametrize("name", ["both", None, True])
def test_unknown_cache_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=rf"cache must be one of \['none', 'prefix', 'dual'\], got {name!r}"):
        SamplerConfig(cache=name)


def test_an_enabled_model_is_sparse_in_full_passes_and_dense_in_short_cached_ones() -> None:
    model, case = make_model(), {"steps": 6, "gen_length": 12, "block_length": 6}
    prompts = [make_prompt(length, seed=length) for length in LENGTHS]
    reason = "too few queries over more keys to be worth it"
    with baatt.enable(model, SPARSE) as handle, pytest.warns(NoSparseAttentionWarning, match=reason):
        generate(model, *padded(prompts), SamplerConfig(**case, cache="dual"))
    assert handle.sparse_calls == 2 * 3
    assert handle.reasons == {reason: 4 * 3}


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("policy", [None, Policy(min_queries=9), Policy(dense_layers=(1,)), Policy(dense_steps=0.5)])
@pytest.mark.parametrize("own", [(), (0,), (0, 1, 2)])
@pytest.mark.filterwarnings("ignore::baatt.integrations.handle.NoSparseAttentionWarning")
def test_short_steps_that_are_counted_together_are_counted_as_if_one_by_one(
    cache: str, policy: Policy | None, own: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where some layers have an attention of their own, which is not counted."""
    model, found = make_model(), []
    functions = [
        (lambda *x, key_mask: dense_attention(*x, key_mask=key_mask)) if layer in own else dense_attention
        for layer in range(3)
    ]
    given = {"attention": functions} if own else {}
    caller = Mock(side_effect=lambda *x, **options: model(*x, **given, **options), config=model.config)
    config = SamplerConfig(steps=6, gen_length=12, block_length=6, cache=cache)
    inputs = padded([make_prompt(length, seed=length) for length in LENGTHS])
    for is_one_by_one in (False, True):
        if is_one_by_one:
            monkeypatch.setattr(Handle, "short_step", lambda *_: None)
        with baatt.enable(model, SPARSE, policy) as handle:
            tokens = generate(caller, *inputs, config, on_step=handle.at_step).tokens
        assert not {*own} & handle.layers.keys()
        found.append((handle.reasons, handle.layers, handle.tally(), handle.report(), tokens.tolist()))
    assert found[0] == found[1]


# --- the command -----------------------------------------------------------------------------------------------------

SHORT = ["--gen-length", "16", "--block-length", "8", "--steps", "16", "--dense"]


@pytest.mark.parametrize(
    ("cache", "ends"), [("dual", ", 14 of them of one block with cached keys and values"), ("none", "")]
)
def test_generate_says_how_fast_it_was(cache: str, ends: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", EXAMPLE, "--cache", cache, "--threshold", "none", *SHORT]) == 0
    printed = capsys.readouterr()
    pattern = rf"[\d.]+ tokens/s: 16 tokens in [\d.]+ s, 16 model evaluations{ends}\n"
    assert re.fullmatch(pattern, printed.err)
    assert "tokens/s" not in printed.out


def test_generate_stores_how_fast_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "generate",
                "--prompt",
                "Most SQL engines",
                "--cache",
                "prefix",
                "--threshold",
                "0",
                "--no-stop-at-eos",
                "--json",
                *SHORT,
            ]
        )
        == 0
    )
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert (record["full_evaluations"], record["cached_evaluations"], record["model_evaluations"]) == (2, 0, 2)
    assert record["tokens_per_second"] == 16 / record["seconds"]
    assert (record["sampler"]["cache"], record["sampler"]["threshold"]) == ("prefix", 0.0)
    assert printed.err == ""


def test_generate_refuses_a_cache_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baatt.cli.generate.check_memory", lambda *_: None)
    monkeypatch.setattr("baatt.lab.loading.free_bytes", lambda device: 2**18)
    assert main(["generate", "--prompt", "Most SQL engines", "--cache", "dual", *SHORT]) == 2
    assert re.search(
        r"--cache dual must fit into memory: keys and values of \d+ tokens need about 0.0 GiB", capsys.readouterr().err
    )


# --- the shipped model -----------------------------------------------------------------------------------------------


def test_needles_are_found_with_every_cache() -> None:
    model = MaskedDiffusionLM.from_pretrained(shipped_model(), dtype=torch.float32)
    tokenizer = load_tokenizer(shipped_model())
    samples = [draw_samples(task, 1024, 1, tokenizer)[0] for task in ("niah_single_2", "niah_multikey_2")]
    sampler = SamplerConfig(steps=32, gen_length=32, block_length=16, threshold=0.9, stop_at_eos=True)
    for cache in CACHES:
        cell = Cell("any", 1024, sampler=dataclasses.replace(sampler, cache=cache))
        answers = RulerModel(model, tokenizer).answer(cell, list(enumerate(samples)))
        assert [one.exact for one in answers] == [True, True]
