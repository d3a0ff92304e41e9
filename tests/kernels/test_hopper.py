"""The Gluon kernel compiles for sm_90a without a GPU: both head dims, no spills, the schedule it was written for."""

import importlib.util
import itertools
import re

import pytest
import torch

from baatt.kernels import hopper
from baatt.stages.selection import select_blocks
from baatt.stages.structure import look_back
from baatt.types import BlockSelection
from tests.processes import run_code
from tests.test_causal import NAMES, structures

SCRIPT = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.tools import disasm
from baatt.kernels.hopper_kernel import attention_kernel as kernel, gl, ring_stages

disasm.FLINE_RE = re.compile(disasm.FLINE_RE.pattern.replace("{4}", "{4,}"))  # it stops after 4096 instructions

def compile_for(channels, dtype, order, tiles, sight):
    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]

    layout = gl.NVMMASharedLayout.get_default_for([1, 1, 128, channels], element)
    descriptor = f"tensordesc<{dtype}[1, 1, 128, {channels}],{layout!r}>"
    signature = {name: "i32" for name in kernel.arg_names}
    signature |= {"q_ptr": f"*{dtype}", "k_descriptor": descriptor, "v_descriptor": descriptor}
    signature |= {"limit_ptr": "*i32", "spans_ptr": "*i32"}
    signature |= {"index_ptr": "*i32", "count_ptr": "*i32", "order_ptr": "*i64", "length_ptr": "*i64"}
    signature |= {"tiles_ptr": "*i32", "out_ptr": f"*{dtype}", "lse_ptr": "*fp32", "scale_log2": "fp32"}
    values = {"BLOCK": 128, "CHANNELS": channels, "STAGES": ring_stages(channels), "DTYPE": element}
    if order == "none":
        values["order_ptr"] = None
    if tiles == "dealt":
        values["tiles_ptr"] = None
    if sight == "all":
        values |= {"limit_ptr": None, "spans_ptr": None}
    signature |= {name: "constexpr" for name in values}
    constants = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    # What the launcher finds in usual inputs: pointers and strides that are multiples of 16.
    even = ["q_ptr", "stride_batch", "stride_head", "stride_token", "out_ptr", "lse_ptr", "order_ptr", "limit_ptr"]
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even if name not in values}
    compiled = triton.compile(
        GluonASTSource(kernel, signature, constants, hints), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}
    )
    print("<compiled>", compiled.metadata.shared, compiled.metadata.num_warps)
    print(compiled.asm["ptx"])
    print(disasm.get_sass(compiled.asm["cubin"]))


for kind in sys.argv[1:]:
    channels, *rest = kind.split(",")
    compile_for(int(channels), *rest)
"""
USUAL = [(128, "bf16", "none", "dealt", "all"), (128, "bf16", "none", "claimed", "causal")]
OTHERS = [
    (128, "bf16", "none", "claimed", "all"),
    (128, "bf16", "sorted", "dealt", "all"), (64, "bf16", "sorted", "claimed", "all"),
    (64, "bf16", "none", "dealt", "all"), (128, "fp16", "none", "dealt", "all"),
    (128, "fp16", "sorted", "claimed", "all"), (128, "bf16", "sorted", "claimed", "causal"),
    (128, "fp16", "none", "dealt", "causal"), (64, "bf16", "sorted", "claimed", "causal"),
]  # fmt: skip


@pytest.mark.parametrize("kinds", [USUAL, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["usual", "others"])
def test_compiles_as_designed(kinds, tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    asked = [",".join(map(str, kind)) for kind in kinds]
    run = run_code(SCRIPT, *asked, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr[-2000:]
    for kind, printed in zip(kinds, run.stdout.split("<compiled>")[1:], strict=True):
        check_compiled(printed, tiles=kind[3])


def check_compiled(printed, tiles):
    shared, warps = map(int, printed.split("\n", 1)[0].split())
    assert shared <= 232448
    assert warps == 12
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", printed)
    # Per consumer: first scores, scores with the product with V still running, that product, the last one.
    assert waits == ["0", "0", "1", "0"] * 2 or sorted(waits) == ["0"] * 6 + ["1"] * 2
    assert "HGMMA" in printed
    # Consumers take turns: each waits twice, for its products with a block and for its last one, and passes it on.
    turns = re.findall(r"bar\.(\w+) (9|10), 256;", printed)
    assert sorted(turns) == sorted([*2 * [("sync", "9"), ("sync", "10"), ("arrive", "10")], *3 * [("arrive", "9")]])
    assert ("atom.global" in printed) == (tiles == "claimed")
    assert not re.search(r"\b(LDL|STL)\b", printed), "registers are spilled"
    assert {"240", "24"} <= set(re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", printed))


def walk(kept, limit, whole, size, keys):
    """How often rows meet each key as `hopper_kernel.consume` goes through a list: with a mask until one needs none."""
    met, masked = torch.zeros(len(limit), keys, dtype=torch.int), True
    for slot, block in enumerate(reversed(kept)):
        masked = slot == 0 or (masked and block >= whole)
        columns = torch.arange(block * size, min((block + 1) * size, keys))
        met[:, columns] += (columns < limit[:, None]).int() if masked else 1
    return met


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("queries", [37, 61])
def test_rows_meet_what_they_see_once(name, queries):
    structure = {"query_start": 61 - queries, **structures(queries, 61)[name]}
    masks = structure.get("key_mask"), structure.get("query_mask")
    q, k = torch.empty(2, 3, queries, 1), torch.empty(2, 3, 61, 1)
    sight = look_back(q, k, structure["causal"], structure["query_start"], 8, *masks)
    length = torch.full((2,), 61) if masks[0] is None else masks[0].expand(2, -1).sum(-1)
    size = (length[:, None] - torch.arange(0, 61, 8)).clamp(0, 8)
    scores = torch.randn(2, 3, sight.limit.shape[1], 8)
    index, count, _ = select_blocks(scores, size, 0.4, sight=sight)
    for entry, head, row in itertools.product(*map(range, count.shape)):
        limit, whole = sight.limit[entry, row], int(sight.spans[entry, row, 2])
        kept = index[entry, head, row, : max(1, int(count[entry, head, row]))].tolist()
        seen = torch.arange(61) < limit[:, None]
        listed = torch.isin(torch.arange(61) // 8, torch.tensor(kept))
        wanted = limit > 0  # what others get means nothing, but where nobody is wanted there is nothing to see
        wanted |= ~wanted.any()
        assert torch.equal(walk(kept, limit, whole, 8, 61)[wanted], (seen & listed).int()[wanted])


def test_another_block_size_is_refused():
    x = torch.zeros(1, 1, 64, 64)
    nothing = BlockSelection(torch.zeros(1, 1, 1, 1).int(), torch.ones(1, 1, 1).int())
    with pytest.raises(ValueError, match=r"^block_size must be 128, got 64$"):
        hopper.sparse_attention(x, x, x, None, None, nothing, block_size=64, scale=1.0)


def test_keys_that_tma_can_read_are_not_copied():
    x = torch.randn(2, 300, 5, 64).bfloat16()
    for view in (x.transpose(1, 2), x.transpose(1, 2)[:, 1:3], x[:, 8:200].transpose(1, 2), x[:1, :1], x[:, :, ::2]):
        assert hopper._readable(view) is view
        descriptor = hopper.tile_descriptor(view, hopper.DTYPES[x.dtype])
        assert descriptor.base is view
        assert descriptor.shape == list(view.shape)
        assert all(a == b for a, b, n in zip(descriptor.strides, view.stride(), view.shape, strict=True) if n > 1)


def test_keys_that_tma_cannot_read_are_copied():
    wide = torch.randn(2, 4, 300, 131).bfloat16()
    even = torch.randn(2 * 4 * 300 * 64 + 8).bfloat16()
    views = {
        "channels apart": wide[..., :128:2],
        "rows not aligned": wide[..., :64],
        "begin not aligned": even[1:-7].view(2, 4, 300, 64),
        "heads share memory": even[: 2 * 300 * 64].view(2, 1, 300, 64).expand(2, 4, 300, 64),
    }
    for name, view in views.items():
        copy = hopper._readable(view)
        assert copy.is_contiguous(), name
        assert copy.data_ptr() != view.data_ptr(), name
        assert torch.equal(copy, view), name
        hopper.tile_descriptor(copy, hopper.DTYPES[copy.dtype])
