"""The Gluon kernels of clusters compile for sm_90a without a GPU: no spills, products that run beside other work."""

import importlib.util
import re

import pytest

from baatt.kernels import hopper_shares_kernel
from tests.processes import run_code

SCRIPT = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.tools import disasm
from baatt.kernels.hopper_clusters_kernel import centre_kernel, gl, refine_kernel
from baatt.kernels.hopper_shares_kernel import share_kernel

disasm.FLINE_RE = re.compile(disasm.FLINE_RE.pattern.replace("{4}", "{4,}"))  # it stops after 4096 instructions

def compile_for(kernel, channels, pointers, values, odd):
    layout = gl.NVMMASharedLayout.get_default_for([1, 1, 128, channels], gl.bfloat16)
    pointers = pointers | {"descriptor": f"tensordesc<bf16[1, 1, 128, {channels}],{layout!r}>"}
    pointers = {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
    values = values | {"CHANNELS": channels, "DTYPE": gl.bfloat16}
    signature = {name: "i32" for name in kernel.arg_names} | pointers | dict.fromkeys(values, "constexpr")
    constants = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    strides = [name for name in kernel.arg_names if re.match("stride|[qk]_(batch|head|token)", name)]
    even = [*strides, *(name for name, kind in pointers.items() if kind.startswith("*"))]
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even if name not in odd}
    compiled = triton.compile(
        GluonASTSource(kernel, signature, constants, hints), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}
    )
    print("<compiled>", kernel.__name__, compiled.metadata.shared, compiled.metadata.num_warps)
    print(disasm.get_sass(compiled.asm["cubin"]))

channels = int(sys.argv[1])
tokens = {"q_ptr": "*bf16", "k_ptr": "*bf16", "centre_ptr": "*i32", "nearest_ptr": "*i8"}
lengths = {"query_length_ptr": "*i64", "key_length_ptr": "*i64"}
orders = {"query_order_ptr": "*i64", "key_order_ptr": "*i64"}
means = {"mean_ptr": "*bf16", "number_ptr": "*i64", "query_size_ptr": "*i64", "key_size_ptr": "*i64"}
values = {"WARPS": 4, "query_order_token": 1, "key_order_token": 1}
compile_for(centre_kernel, channels, tokens | lengths, values | dict.fromkeys(orders), list(lengths))
compile_for(refine_kernel, channels, tokens | lengths | orders | means, values | {"CLUSTERS": 16}, list(lengths))
sides = {"q_ptr": "*bf16", "q_tokens_ptr": "*i64", "number_ptr": "*fp32", "scores_ptr": "*fp32", "scratch_ptr": "*fp32"}
values = {"QUERY_CLUSTERS": 16, "KEY_CLUSTERS": 16, "PEAK": True, "STAGES": 4}
sides |= {"scale_log2": "fp32"}
compile_for(share_kernel, channels, sides, values | dict.fromkeys(["spans_ptr", "stride_spans"]), [])
compile_for(share_kernel, channels, sides | {"spans_ptr": "*i32"}, values, [])
"""


def innermost_loops(code):
    """The instructions between a label and a branch back to it, without another such branch between them."""
    lines = code.splitlines()
    labels = {match[1]: number for number, line in enumerate(lines) if (match := re.match(r"(LBB\d+):", line))}
    branches = [(number, match[1]) for number, line in enumerate(lines) if (match := re.search(r"BRA (LBB\d+)", line))]
    loops = [(labels[label], number) for number, label in branches if labels.get(label, number) < number]
    inner = [one for one in loops if not any(one[0] <= a and b < one[1] for a, b in loops)]
    return ["\n".join(lines[first : last + 1]) for first, last in inner]


@pytest.mark.parametrize("channels", [128, pytest.param(64, marks=pytest.mark.slow)])
def test_compiles_as_designed(channels, tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    run = run_code(SCRIPT, str(channels), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr[-2000:]
    parts = [part.split(maxsplit=3) for part in run.stdout.split("<compiled> ")[1:]]
    assert [part[0] for part in parts] == ["centre_kernel", "refine_kernel", "share_kernel", "share_kernel"]
    # Three blocks on a multiprocessor have their products at once, four or more are refined.
    most = {"centre_kernel": 75 * 1024, "refine_kernel": 56 * 1024, "share_kernel": 227 * 1024}
    for name, shared, warps, code in parts:
        assert int(shared) <= most[name]
        assert int(warps) == (16 if name == "share_kernel" else 4)
        assert "HGMMA" in code
        assert name == "share_kernel" or "LDGSTS.E.BYPASS.128" in code  # tokens do not go through registers
        # What the parts of a kernel share may lie in memory between tiles, but not where exponentials are taken.
        checked = [code] if name != "share_kernel" else [loop for loop in innermost_loops(code) if "MUFU.EX2" in loop]
        assert checked
        assert not any(re.search(r"\b(LDL|STL)\b", part) for part in checked), "registers are spilled"


@pytest.mark.parametrize(("all_heads", "head_tiles", "programs"), [(32, 11, 132), (32, 86, 132), (3, 5, 15), (1, 7, 2)])
def test_tiles_of_unequal_length_are_dealt_evenly(all_heads, head_tiles, programs):
    tiles = all_heads * head_tiles
    place_of = hopper_shares_kernel.place_of.fn
    for spans in (None, "some"):
        dealt = [place_of(tile, programs, tiles, head_tiles, spans) for tile in range(tiles)]
        assert sorted(dealt) == [divmod(tile, head_tiles) for tile in range(tiles)]
    work = [sum(1 + part for _, part in dealt[program::programs]) for program in range(programs)]
    assert max(work) <= max(head_tiles, 1.15 * sum(work) / programs)
