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

def compile_for(channels, dtype):
    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]

    layout = gl.NVMMASharedLayout.get_default_for([1, 128, channels], element)
    descriptor = f"tensordesc<{dtype}[1, 128, {channels}],{layout!r}>"
    signature = {name: "i32" for name in kernel.arg_names}
    signature |= {"q_ptr": f"*{dtype}", "k_descriptor": descriptor, "v_descriptor": descriptor}
    signature |= {"index_ptr": "*i32", "count_ptr": "*i32", "order_ptr": "*i64", "length_ptr": "*i64"}
    signature |= {"out_ptr": f"*{dtype}", "lse_ptr": "*fp32", "scale_log2": "fp32"}
    values = {"BLOCK": 128, "CHANNELS": channels, "STAGES": ring_stages(channels), "DTYPE": element}
    signature |= {name: "constexpr" for name in values}
    constants = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    # What the launcher finds in usual inputs: pointers and strides that are multiples of 16.
    even = ["q_ptr", "stride_batch", "stride_head", "stride_token", "out_ptr", "lse_ptr", "order_ptr"]
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    compiled = triton.compile(
        GluonASTSource(kernel, signature, constants, hints), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}
    )
    print(compiled.metadata.shared, compiled.metadata.num_warps)
    print(compiled.asm["ptx"])
    print(get_sass(compiled.asm["cubin"]))


compile_for(int(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(128, "bf16"), *(pytest.param(*kind, marks=pytest.mark.slow) for kind in ((64, "bf16"), (128, "fp16")))],
)
def test_compiles_as_designed(channels, dtype, tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(channels), dtype]
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
    assert not re.search(r"\b(LDL|STL)\b", printed), "registers are spilled"
    assert {"240", "24"} <= set(re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", printed))


def test_another_block_size_is_refused():
    x = torch.zeros(1, 1, 64, 64)
    nothing = BlockSelection(torch.zeros(1, 1, 1, 1).int(), torch.ones(1, 1, 1).int())
    with pytest.raises(ValueError, match=r"^block_size must be 128, got 64$"):
        hopper.sparse_attention(x, x, x, None, None, nothing, block_size=64, scale=1.0)
