"""A kernel of warp-specialised parts that do nothing but say so: what racecheck finds in it is not of our kernels."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def say(out_ptr, NUMBER: gl.constexpr):
    """Store the number at the place of this part."""
    gl.store(out_ptr + gl.program_id(0) * 3 + NUMBER - 1, NUMBER)


@gluon.jit
def parts_kernel(out_ptr):
    """out [programs, 3]."""
    gl.warp_specialize([(say, (out_ptr, 1)), (say, (out_ptr, 2)), (say, (out_ptr, 3))], [4, 1], [240, 24])
