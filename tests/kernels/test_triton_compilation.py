"""Every launch of the portable kernels compiles for the GPUs they are for, on a machine that has none.

The launches are those that the host functions really make: in a process of its own, without the interpreter, they are
caught on their way to a device and compiled instead.
"""

import importlib.util

import pytest

from tests.processes import run_code

SCRIPT = """
import os
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# The imports above are made once; every target is compiled for in a process of its own that starts from here.
for text in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{text} failed")
else:
    sys.exit(0)

backend, architecture, warp, shared_memory, chosen = text.split(",")
target = GPUTarget(backend, int(architecture) if backend == "cuda" else architecture, int(warp))
shared_memory = int(shared_memory) * 1024
if backend == "hip":
    torch.version.hip = "for the constants that depend on it"
from baatt import BAAttConfig
from baatt.backend import _sort_on_gpu, _choose_on_gpu
from baatt.kernels import triton_antidiagonal, triton_attention, triton_budget, triton_clusters
from baatt.kernels import triton_mass, triton_structure
from baatt.scores import exact

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
         torch.bool: "i1"}
CASES = {
    "usual": (torch.bfloat16, 128, 128, True, "k"), "half": (torch.float16, 64, 64, False, "k"),
    "in place": (torch.bfloat16, 128, 128, False, "none"), "most shared memory": (torch.float32, 256, 128, False, "k"),
    "wide": (torch.bfloat16, 256, 128, False, "q"), "small": (torch.float32, 40, 16, True, "none"),
    "causal": (torch.bfloat16, 128, 128, False, "none"), "causal small": (torch.float32, 40, 16, True, "none"),
    "causal wide": (torch.bfloat16, 256, 128, True, "none"), "causal half": (torch.float16, 64, 64, False, "none"),
}
done = {}


def compile_launch(kernel, *args, grid, warmup, **options):
    # CUDA's limit is 65,535 for all axes but the first, and there may be more heads than that.
    assert len(grid) == 1 or kernel.__name__ == "_longest_kernel", f"{kernel.__name__} has a grid of {grid}"
    signature, constants, hints = {}, {}, {}
    named = {name: options.pop(name) for name in kernel.arg_names if name in options}
    values = dict(zip(kernel.arg_names, args)) | named
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:  # as the launcher does
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], hints[(place,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                hints[(place,)] = [["tt.divisibility", 16]]
    # The default set compiles a kernel once for each combination of its switches.
    switches = str([value for value in constants.values() if isinstance(value, bool)])
    if chosen != "all" and kernel.__name__ != "_attention_kernel" and switches in done.get(kernel.__name__, ()):
        return
    compiled = triton.compile(ASTSource(kernel, signature, constants, hints), target=target, options=options)
    needed = compiled.metadata.shared
    assert needed <= shared_memory, f"{kernel.__name__} needs {needed} bytes for {options}, {constants}"
    if kernel.__name__ == "_attention_kernel" and backend == "cuda" and args[0].element_size() == 2:
        assert "cp.async.cg" in compiled.asm["ptx"], "keys and values do not come 16 bytes at a time"
        assert "cp.async.ca" not in compiled.asm["ptx"], "keys or values come less than 16 bytes at a time"
    done.setdefault(kernel.__name__, set()).add(switches)


JITFunction.run = compile_launch
triton_clusters._is_blackwell = lambda device: backend == "cuda" and int(architecture) >= 100
for room in (triton_attention, triton_clusters, triton_mass):
    room._shared_memory = lambda device: shared_memory
for name in CASES if chosen == "all" else chosen.split("+"):
    dtype, channels, block_size, masked, sort = CASES[name]
    q, k, v = (torch.zeros(1, 300, heads, channels, dtype=dtype).transpose(1, 2) for heads in (4, 2, 2))
    mask = torch.ones(1, 300, dtype=torch.bool) if masked else None
    config = BAAttConfig(block_size, 0.5, sort, 256, "covariance", keep_first=0)
    arranged = _sort_on_gpu({}, q, k, v, config, mask)
    sight = triton_structure.look_back(q, k, 4, 3, block_size)
    sight = sight if "causal" in name else None
    selection = _choose_on_gpu({}, arranged.query_summary, arranged.key_summary, config, 0.1, sight)
    for logits, triton_budget.ALONE in ((True, 0), (False, 0), (True, 4096), (False, 4096)):
        scores = torch.zeros(1, 4, *(side.size.shape[1] for side in (arranged.query_summary, arranged.key_summary)))
        triton_budget.choose_blocks(*arranged[1:4:2], lambda *_: scores, 0.5, 1, sight, logits=logits)
    triton_budget.longest_first(selection.count, 2)
    triton_attention.sparse_attention(
        q, k, v, arranged.query_order, arranged.key_order, selection, block_size=block_size, scale=0.1, sight=sight
    )
    blocks, size = -(-300 // block_size), torch.zeros(1, -(-300 // block_size), dtype=torch.int64)
    tokens = [exact.BlockTokens(x.new_zeros(*x.shape[:2], blocks, block_size, channels), size) for x in (q, k)]
    triton_mass.compare(*tokens, config, 0.1, sight)
    triton_mass.compare_peak(*tokens, config, 0.1, sight)
    triton_antidiagonal.compare(*tokens, config, 0.1, sight, stride=8)
    if triton_clusters.fits(q, block_size):
        sides = (q, arranged.query_order), (k, arranged.key_order)
        triton_clusters.compare(*(triton_clusters.summarise(*side, config) for side in sides), config, 0.1, sight)
print(architecture, *sorted(done))
"""
KERNELS = [
    "_attention_kernel", "_cluster_kernel", "_covariance_kernel", "_digit_kernel", "_gather_kernel",
    "_head_kernel", "_list_kernel", "_logit_kernel", "_longest_kernel", "_narrow_kernel", "_norm_kernel",
    "_order_kernel", "_permute_kernel", "_rank_kernel", "_select_kernel", "_share_kernel", "_sight_kernel",
    "_sum_kernel", "_tie_kernel",
]  # fmt: skip
#: Backend, architecture, threads per warp, KiB of shared memory per block.
NEWEST = ["cuda,90,32,227", "hip,gfx942,64,64"]
OTHERS = ["cuda,80,32,163", "cuda,86,32,99", "cuda,89,32,99", "cuda,100,32,227", "cuda,120,32,99"]


@pytest.mark.parametrize(
    "targets",
    [
        {NEWEST[0]: "causal+usual", NEWEST[1]: "half"},
        pytest.param(dict.fromkeys(NEWEST, "all"), marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
        pytest.param(dict.fromkeys(OTHERS, "all"), marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
    ids=["newest", "all of the newest", "all of the others"],
)
def test_every_launch_compiles(targets, tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    asked = [f"{target},{case}" for target, case in targets.items()]
    run = run_code(SCRIPT, *asked, timeout=900, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == [f"{target.split(',')[1]} {' '.join(KERNELS)}" for target in targets]
