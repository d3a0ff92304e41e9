"""The Gluon kernel compiles for sm_90a without a GPU: both head dims, no spills, the schedule it was written for."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from baatt.kernels import hopper
from baatt.types import BlockSelection

SCRIPT = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.tools.disasm import get_sass
from baatt.kernels.hopper_kernel import attention_kernel as kernel, gl, ring_stages

def compile_for(channels, dtype, order, tiles):
    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]

    layout = gl.NVMMASharedLayout.get_default_for([1, 1, 128, channels], element)
    descriptor = f"tensordesc<{dtype}[1, 1, 128, {channels}],{layout!r}>"
    signature = {name: "i32" for name in kernel.arg_names}
    signature |= {"q_ptr": f"*{dtype}", "k_descriptor": descriptor, "v_descriptor": descriptor}
    signature |= {"index_ptr": "*i32", "count_ptr": "*i32", "order_ptr": "*i64", "length_ptr": "*i64"}
    signature |= {"tiles_ptr": "*i32", "out_ptr": f"*{dtype}", "lse_ptr": "*fp32", "scale_log2": "fp32"}
    values = {"BLOCK": 128, "CHANNELS": channels, "STAGES": ring_stages(channels), "DTYPE": element}
    if order == "none":
        values["order_ptr"] = None
    if tiles == "dealt":
        values["tiles_ptr"] = None
    signature |= {name: "constexpr" for name in values}
    constants = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    # What the launcher finds in usual inputs: pointers and strides that are multiples of 16.
    even = ["q_ptr", "stride_batch", "stride_head", "stride_token", "out_ptr", "lse_ptr", "order_ptr"]
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even if name not in values}
    compiled = triton.compile(
        GluonASTSource(kernel, signature, constants, hints), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}
    )
    print(compiled.metadata.shared, compiled.metadata.num_warps)
    print(compiled.asm["ptx"])
    print(get_sass(compiled.asm["cubin"]))


compile_for(int(sys.argv[1]), *sys.argv[2:])
"""
USUAL = [(128, "bf16", "none", "dealt"), (128, "bf16", "none", "claimed")]
OTHERS = [
    (128, "bf16", "sorted", "dealt"), (64, "bf16", "sorted", "claimed"), (64, "bf16", "none", "dealt"),
    (128, "fp16", "none", "dealt"), (128, "fp16", "sorted", "claimed"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("channels", "dtype", "order", "tiles"),
    [*USUAL, *(pytest.param(*kind, marks=pytest.mark.slow) for kind in OTHERS)],
)
def test_compiles_as_designed(channels, dtype, order, tiles, tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(channels), dtype, order, tiles]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    printed = run.stdout
    shared, warps = map(int, printed.split("\n", 1)[0].split())
    assert shared <= 232448
    assert warps == 12
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", printed)
    # Per consumer: first scores, scores with the product with V still running, that product, the last one.
    assert waits == ["0", "0", "1", "0"] * 2 or sorted(waits) == ["0"] * 6 + ["1"] * 2
    assert "HGMMA" in printed
    assert ("atom.global" in printed) == (tiles == "claimed")
    assert not re.search(r"\b(LDL|STL)\b", printed), "registers are spilled"
    assert {"240", "24"} <= set(re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", printed))


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
