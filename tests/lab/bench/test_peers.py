"""Our lists in the layouts of other libraries: stand-ins read them back as a mask of tokens, as their kernels would."""

import dataclasses
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange

from baatt import attend, ba_attention, make_plan
from baatt.config import BAAttConfig
from baatt.lab.bench import baselines, peers
from baatt.lab.bench.baselines import BASELINES, RefusedError, prepare_baseline
from baatt.lab.bench.benchmarks import measure, random_plan
from baatt.lab.bench.case import Case, Inputs, Shape, make_inputs
from tests.settings import sorted_config

TOKENS = 640


def attention(q, k, v, mask, scale):
    """mask: [B, H, N, M] bool."""
    logits = (q @ k.mT * scale).masked_fill(~mask, -math.inf)
    return logits.softmax(-1) @ v


def spread(table, size):
    return table.repeat_interleave(size, -1).repeat_interleave(size, -2)


def mask_of_lists(index, count, size, blocks):
    """[B, H, N, M] of lists, slot by slot."""
    table = torch.zeros(*count.shape, blocks, dtype=torch.bool)
    for place in torch.cartesian_prod(*map(torch.arange, count.shape)).tolist():
        kept = index[tuple(place)][: int(count[tuple(place)])].long()
        assert (kept.diff() > 0).all()
        table[tuple(place)][kept] = True
    return spread(table, size)


def flash_4():
    def flash_attn_func(q, k, v, *, softmax_scale, block_sparse_tensors=None):
        assert q.is_contiguous()
        q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (q, k, v))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        if block_sparse_tensors is not None:
            given = block_sparse_tensors
            assert given.block_size == (128, 128)
            assert given.mask_block_cnt.eq(0).all()
            assert {x.dtype for x in (given.mask_block_cnt, given.mask_block_idx, given.full_block_idx)} == {
                torch.int32
            }
            assert given.mask_block_idx.shape[:3] == given.mask_block_cnt.shape == given.full_block_cnt.shape
            mask = mask_of_lists(given.full_block_idx, given.full_block_cnt, 128, k.shape[2] // 128)
        return rearrange(attention(q, k, v, mask, softmax_scale), "b h n d -> b n h d"), None

    tensors = lambda **given: SimpleNamespace(**given)  # noqa: E731
    return {
        "flash_attn.cute": SimpleNamespace(flash_attn_func=flash_attn_func),
        "flash_attn.cute.block_sparsity": SimpleNamespace(BlockSparseTensorsTorch=tensors),
    }


def cudnn():
    def forward(
        q,
        k,
        v,
        q2k_block_index,
        block_sparse_num=None,
        q2k_block_nums=None,
        *,
        sparse_block_size,
        softmax_scale,
        layout,
    ):
        assert (sparse_block_size, layout) == (128, "bhsd")
        count = torch.full(q2k_block_index.shape[:3], block_sparse_num) if q2k_block_nums is None else q2k_block_nums
        mask = mask_of_lists(q2k_block_index, count, 128, k.shape[2] // 128)
        return {"o_tensor": attention(q, k, v, mask, softmax_scale)}

    return {"cudnn.block_sparse_attention.api": SimpleNamespace(block_sparse_attention_forward=forward)}


def flashinfer():
    class Wrapper:
        def __init__(self, workspace, backend):
            assert (workspace.dtype, backend) == (torch.uint8, "cake")

        def plan(self, table, rows, columns, heads, key_heads, channels, *, sm_scale, q_data_type):
            assert (table.dtype, rows.dtype, columns.dtype) == (torch.bool, torch.int32, torch.int32)
            assert heads == key_heads == table.shape[0]
            assert (rows.sum(-1) == TOKENS).all()
            assert (columns.sum(-1) == TOKENS).all()
            self.mask, self.scale = spread(table, 64), sm_scale

        def run(self, q, k, v):
            return attention(q, k, v, self.mask, self.scale)

    return {"flashinfer.sparse": SimpleNamespace(VariableBlockSparseAttentionWrapper=Wrapper)}


def vsa():
    def block_sparse_fwd(q, k, v, index, count, sizes):
        assert (sizes == 64).all()
        assert index.shape == (*count.shape, len(sizes))
        return attention(q, k, v, mask_of_lists(index, count, 64, len(sizes)), q.shape[3] ** -0.5), None

    return {"vsa_cuda": SimpleNamespace(block_sparse_fwd=block_sparse_fwd)}


STAND_INS = {"fa4": flash_4, "fa4-dense": flash_4, "cudnn-bsa": cudnn, "flashinfer": flashinfer, "vsa": vsa}


@pytest.fixture
def installed(monkeypatch):
    for stand_in in STAND_INS.values():
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)


def inputs_and_plan(config, *, heads=2):
    inputs = make_inputs(case(heads=heads))
    return inputs, make_plan(inputs.q, inputs.k, config)


def case(**options):
    heads = options.pop("heads", 2)
    shape = Shape(1, heads, heads, TOKENS, 16)
    return Case("kernel", shape, BAAttConfig(128, 0.5), torch.float32, torch.device("cpu"), **options)


CONFIGS = {
    "sorted": sorted_config(sparsity=0.5, block_size=128, segment=256),
    "uneven": BAAttConfig(128, 0.5, budget="head"),
}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", [name for name in peers.PEERS if name != "fa4-dense"])
@pytest.mark.parametrize("config", list(CONFIGS))
def test_they_attend_to_our_blocks(name, config):
    inputs, plan = inputs_and_plan(CONFIGS[config])
    if config == "uneven":
        assert plan.selection.count.unique().numel() > 1
    out = BASELINES[name].prepare(inputs, plan)()  # verified inside, too
    torch.testing.assert_close(out, baselines.sort_tokens(attend(*inputs, plan), plan.query_order))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", [name for name in BASELINES if name.startswith("xattention")])
def test_xattention_chooses_for_itself(name):
    inputs, plan = inputs_and_plan(CONFIGS["sorted"])
    config = BAAttConfig(128, 0.5, "none", 256, "antidiagonal", keep_first=plan.config.keep_first)
    expected = ba_attention(*inputs, config)
    assert not torch.equal(expected, ba_attention(*inputs, plan.config))
    torch.testing.assert_close(BASELINES[name].prepare(inputs, plan)(), expected)
    with pytest.raises(RefusedError, match="it is bidirectional here"):
        BASELINES[name].prepare(inputs, make_plan(inputs.q, inputs.k, BAAttConfig(), causal=1))


@pytest.mark.usefixtures("installed")
def test_dense_flash_4_keeps_every_block():
    inputs, plan = inputs_and_plan(CONFIGS["sorted"])
    dense = dataclasses.replace(CONFIGS["sorted"], sparsity=0.0)
    expected = attend(*inputs, make_plan(inputs.q, inputs.k, dense))
    found = BASELINES["fa4-dense"].prepare(inputs, plan)()
    torch.testing.assert_close(found, baselines.sort_tokens(expected, plan.query_order))


@pytest.mark.usefixtures("installed")
def test_a_wrong_peer_is_refused(monkeypatch):
    inputs, plan = inputs_and_plan(CONFIGS["sorted"])
    monkeypatch.setattr(peers, "cudnn_lists", lambda plan: {
        "q2k_block_index": plan.selection.index.int(), "block_sparse_num": 1,
    })  # fmt: skip
    monkeypatch.setitem(BASELINES, "cudnn-bsa", BASELINES["cudnn-bsa"]._replace(only_half=False))
    with pytest.raises(RefusedError, match="cudnn-bsa must be within a relative error of"):
        prepare_baseline("cudnn-bsa", inputs, plan)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("fa4", "flash-attn-4"),
        ("cudnn-bsa", "nvidia-cudnn-frontend"),
        ("flashinfer", "flashinfer-python"),
        ("vsa", "vsa"),
    ],
)
def test_what_is_not_installed_is_refused_in_one_line(name, package, monkeypatch):
    monkeypatch.setattr(peers.importlib, "import_module", lambda module: (_ for _ in ()).throw(ImportError("no\nmore")))
    inputs, plan = inputs_and_plan(CONFIGS["sorted"])
    with pytest.raises(RefusedError, match=f"^it needs the package {package}: no$"):
        BASELINES[name].prepare(inputs, plan)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", list(peers.PEERS))
def test_what_no_list_says_is_refused(name):
    inputs = make_inputs(case())
    short = Inputs(*(x[:, :, :600] for x in inputs))
    for given, options, message in (
        (inputs, {"config": BAAttConfig(128, 0.5), "causal": 1}, "its lists hold whole blocks here"),
        (short, {"config": BAAttConfig(128, 0.5)}, "it takes whole blocks of 128 tokens here, got 600"),
        (inputs, {"config": BAAttConfig(64, 0.5)}, "got 640 in blocks of 64"),
    ):
        with pytest.raises(RefusedError, match=message):
            BASELINES[name].prepare(given, make_plan(given.q, given.k, **options))
    assert BASELINES[name].refusal("cpu", torch.bfloat16) == "it needs a GPU, got device 'cpu'"


@pytest.mark.usefixtures("installed")
def test_flashinfers_lists_are_short(monkeypatch):
    inputs, plan = inputs_and_plan(CONFIGS["sorted"])
    monkeypatch.setattr(peers, "FLASHINFER_MOST", 4)
    with pytest.raises(RefusedError, match="at most 4 key blocks of 64 a query block, got 6"):
        BASELINES["flashinfer"].prepare(inputs, plan)


@pytest.mark.usefixtures("installed")
def test_the_kernel_runs_in_turns_with_peers(monkeypatch):
    from baatt.lab.bench import timing

    monkeypatch.setattr(timing, "ENOUGH_MS", 0.0)
    monkeypatch.setitem(BASELINES, "fa4", BASELINES["fa4"]._replace(only_half=False))
    record = measure(case(against=("fa4", "vsa", "dense")))
    assert list(record["speedup"]) == ["fa4", "dense"]
    assert record["speedup"]["fa4"] == record["baseline_ms"]["fa4"] / record["total_ms"]
    assert record["refused"] == {"vsa": "it needs a GPU, got device 'cpu'"}
    assert record["selection_share"] is None


def test_lists_of_halves_end_with_minus_one():
    plan = random_plan(case())
    index, count = peers.half_lists(plan)
    assert index.shape == (1, 2, 10, 6)
    assert (count == 6).all()
    one = plan._replace(selection=plan.selection._replace(count=torch.ones_like(plan.selection.count)))
    index, count = peers.half_lists(one)
    assert (count == 2).all()
    assert (index[..., 2:] == -1).all()
    first = plan.selection.index[..., 0]
    assert torch.equal(index[:, :, ::2, :2], torch.stack((2 * first, 2 * first + 1), dim=-1))
