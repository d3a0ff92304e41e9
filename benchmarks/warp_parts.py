"""A warp-specialised kernel of nothing but a textbook ring: what racecheck finds in it is not of our kernels.

A producer puts numbers into a ring in shared memory, two warpgroups add them up; barriers in memory say which slots are
full and which are empty, as in our kernels.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

SLOTS = gl.constexpr(2)


@gluon.jit
def put(ring, full, empty, turns):
    """The producer warp: the numbers from 0 on."""
    alone: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for turn in range(turns):
        mbarrier.wait(empty.index(turn % SLOTS), ((turn // SLOTS) & 1) ^ 1)
        ring.index(turn % SLOTS).store(gl.full([1], turn, gl.int32, layout=alone))
        mbarrier.arrive(full.index(turn % SLOTS), count=1)


@gluon.jit
def take(ring, full, empty, turns, out_ptr, PART: gl.constexpr):
    """One warpgroup: the sum of all numbers, to out [programs, 2]."""
    same: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    total = gl.cast(0, gl.int32)
    for turn in range(turns):
        mbarrier.wait(full.index(turn % SLOTS), (turn // SLOTS) & 1)
        total += gl.max(ring.index(turn % SLOTS).load(same), 0)
        mbarrier.arrive(empty.index(turn % SLOTS), count=1)
    gl.store(out_ptr + gl.program_id(0) * 2 + PART, total)


@gluon.jit
def parts_kernel(out_ptr, turns):
    """Sums [programs, 2] of the numbers below `turns`."""
    ring = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    gl.warp_specialize(
        [
            (take, (ring, full, empty, turns, out_ptr, 0)),
            (take, (ring, full, empty, turns, out_ptr, 1)),
            (put, (ring, full, empty, turns)),
        ],
        [4, 1],
        [240, 24],
    )
