"""What Triton's releases since 3.6 call differently in Gluon; looked for by name, so that unknown releases work too."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

# Since 3.8; 3.9 left only an error under the old names, so the new ones go first.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
load_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
# Since 3.7.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
# Since 3.9.
IS_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def view_as(memory, KIND: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Shared memory as if it held something else."""
    if IS_PUBLIC:
        view = memory.reinterpret(KIND, SHAPE, LAYOUT)
    else:
        view = memory._reinterpret(KIND, SHAPE, LAYOUT)
    return view
