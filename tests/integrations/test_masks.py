"""Masks of every shape: their structure against masks built in loops, why others have none, what is remembered."""

import itertools

import pytest
import torch

from baatt.integrations import masks
from baatt.integrations.masks import NO_MASK, MaskReader, Structure, read_mask

B, H, N, M = 3, 2, 5, 7
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DIFFERS = "a mask that differs between queries"
WINDOW = "a sliding window"
PARTS = "parts of a sequence that do not see one another"


@pytest.fixture
def real():
    """A key mask with padding on the left, the right and inside; one entry without any."""
    real = torch.ones(B, M, dtype=torch.bool)
    real[0, :2], real[1, -3:], real[1, 2] = False, False, False
    return real


@pytest.fixture
def read():
    return MaskReader()


def additive(real, value=None, dtype=torch.float32):
    value = torch.finfo(dtype).min if value is None else value
    return torch.zeros(real.shape, dtype=dtype).masked_fill(~real, value)


def product(real):
    return real[:, None, :, None] & real[:, None, None, :]


def refused(reason):
    return Structure(refusal=reason)


def test_no_mask(read):
    assert read(None, B, M) == NO_MASK == (None,) * 5


# Key masks.


def forms(mask):
    """The ways of writing [B, M] for attention."""
    rows = mask[:, None, None, :]
    yield from (rows, rows.expand(-1, H, -1, -1), rows.expand(-1, -1, N, -1), rows.expand(-1, H, N, -1))
    yield from (rows.repeat(1, 1, N, 1), rows.repeat(1, H, 1, 1), rows.repeat(1, H, N, 1))


def test_bool_key_masks(read, real):
    for mask in (real, *forms(real)):
        found = read(mask, B, M)
        assert found[:2] == (None, None)
        assert found.refusal is None
        assert torch.equal(found.key_mask, real)


def test_a_mask_for_all_batch_entries(read, real):
    for mask in (real[:1], *forms(real[:1]), *forms(additive(real[:1]))):
        found = read(mask, B, M)
        assert found.key_mask.shape == (B, M)
        assert torch.equal(found.key_mask, real[:1].expand(B, M))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [None, -torch.inf, -65504.0, -1e4], ids=str)
def test_additive_key_masks(read, real, dtype, value):
    for mask in forms(additive(real, value, dtype)):
        found = read(mask, B, M)
        assert found.refusal is None
        assert torch.equal(found.key_mask, real)


def test_masks_that_hide_nothing(read):
    ones = torch.ones(B, H, N, M, dtype=torch.bool)
    assert read(ones, B, M) == read(additive(ones), B, M) == NO_MASK


@pytest.mark.parametrize("value", [-9999.0, -1.0, 1e-3, 1.0, torch.inf, torch.nan])
def test_weights_have_no_structure(read, real, value):
    for mask in forms(additive(real, value)):
        assert read(mask, B, M) == refused("an additive mask with weights")


def test_entries_without_any_key(read, real):
    real[2] = False
    for mask in (*forms(real), *forms(additive(real))):
        assert torch.equal(read(mask, B, M).key_mask, real)


@pytest.mark.parametrize(
    ("mask", "refusal"),
    [
        (torch.ones(B, M + 1, dtype=torch.bool), "a mask over 8 of 7 keys"),
        (torch.ones(B, 1, 1, M - 1, dtype=torch.bool), "a mask over 6 of 7 keys"),
        (torch.ones(B, 1, 1, 1, dtype=torch.bool), "a mask over 1 of 7 keys"),
        (torch.ones(2, M, dtype=torch.bool), "a mask for 2 of 3 batch entries"),
        (torch.ones(2, 1, 1, M, dtype=torch.bool), "a mask for 2 of 3 batch entries"),
        (torch.ones(M, dtype=torch.bool), "a mask of torch.bool with 1 axes"),
        (torch.ones(B, N, M, dtype=torch.bool), "a mask of torch.bool with 3 axes"),
        (torch.ones(1, 1, 1, 1, M, dtype=torch.bool), "a mask of torch.bool with 5 axes"),
        (torch.ones(B, M), "a mask of torch.float32 with 2 axes"),
        (torch.ones(B, M, dtype=torch.int64), "a mask of torch.int64 with 2 axes"),
        (torch.ones(B, 1, 1, M, dtype=torch.int64), "a mask of torch.int64"),
        (torch.ones(B, 1, 1, M, dtype=torch.uint8), "a mask of torch.uint8"),
        (torch.eye(M, dtype=torch.bool)[None, :H, None].expand(B, -1, -1, -1), "a mask that differs between heads"),
    ],
)
def test_other_shapes(read, mask, refusal):
    assert read(mask, B, M) == refused(refusal)


@pytest.mark.parametrize("chunk", [1, 50, masks.CHUNK])
@pytest.mark.parametrize("make", [torch.Tensor.bool, additive], ids=["bool", "additive"])
def test_masks_written_out_for_every_query(real, monkeypatch, chunk, make):
    monkeypatch.setattr(masks, "CHUNK", chunk)
    for mask in (real[:, None, None, :].repeat(1, 1, N, 1), product(real)):
        assert torch.equal(read_mask(make(mask)).key_mask, real)
        broken = mask.clone()
        broken[1, 0, 3, 1] = ~broken[1, 0, 3, 1]
        assert read_mask(make(broken)).refusal == DIFFERS


def test_empty_rows_need_as_many_queries_as_keys(real):
    assert read_mask(product(real)[:, :, :N]).refusal == DIFFERS


def test_entries_of_a_batch_may_differ_in_kind(real):
    mask = product(real)
    mask[0] = real[0]
    assert torch.equal(read_mask(mask).key_mask, real)


# Causal structures, against the definition in loops.


def written(structure, batch, queries, keys):
    """The mask [B, N, M] of a structure."""
    mask = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for row, column in itertools.product(range(queries), range(keys)):
        causal, start = structure.causal, structure.query_start
        if causal is None or column // causal <= (start + row) // causal:
            mask[:, row, column] = True if structure.key_mask is None else structure.key_mask[:, column]
    return mask


def unwanted(structure, queries, keys):
    """[B or 1, N] bool, rows that are padding: their result means nothing."""
    if structure.causal is None and queries != keys:
        return torch.zeros(1, queries, dtype=torch.bool)
    mask = structure.wanted(queries)
    return torch.zeros(1, queries, dtype=torch.bool) if mask is None else ~mask


def padded(left, right, keys):
    """One entry with padding, one without."""
    real = torch.ones(2, keys, dtype=torch.bool)
    real[0, :left], real[0, keys - right :] = False, False
    return real


SIZES = [(1, 1), (2, 2), (5, 5), (8, 8), (12, 12), (4, 9), (7, 12), (1, 6), (9, 4), (6, 16)]


@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_every_length_start_and_padding(queries, keys):
    starts = {0, max(0, keys - queries), max(0, (keys - queries) // 2), 3}
    for causal, start in itertools.product([*range(1, keys + 2), 64], starts):
        for left, right in ((0, 0), (1, 0), (3, 0), (0, 1), (0, 3), (2, 2)):
            if left + right >= keys:
                continue
            given = Structure(causal, start, padded(left, right, keys))
            mask = written(given, 2, queries, keys)
            found = read_mask(mask[:, None])
            assert found.refusal is None
            rows = ~unwanted(found, queries, keys).expand(2, -1)
            assert torch.equal(written(found, 2, queries, keys)[rows], mask[rows])
            if found.causal is not None and queries < keys:  # a token that is real is never taken for padding
                own = (start + torch.arange(queries)).clamp(max=keys - 1)
                assert not (~rows & given.key_mask[:, own]).any()


def test_a_place_that_hidden_keys_leave_open():
    """Where the last key of a block is hidden, queries might stand one place earlier, but none is padding for that."""
    real = torch.ones(1, 64, dtype=torch.bool)
    real[0, [31, 47]] = False
    mask = written(Structure(16, 16, real), 1, 32, 64)
    found = read_mask(mask[:, None])
    assert torch.equal(written(found, 1, 32, 64), mask)
    assert found.wanted(32).all()


@pytest.mark.parametrize("causal", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("chunk", [7, masks.CHUNK])
@pytest.mark.parametrize("make", [torch.Tensor.bool, additive], ids=["bool", "additive"])
def test_rows_of_padding_may_see_nothing(causal, chunk, make, monkeypatch):
    monkeypatch.setattr(masks, "CHUNK", chunk)
    for left, right in ((0, 0), (3, 0), (0, 5), (2, 3)):
        real = padded(left, right, 16)
        mask = written(Structure(causal, 0), 2, 16, 16)[:, None] & product(real)
        found = read_mask(make(mask))
        assert found[:2] == (causal, 0)
        assert (found.key_mask is None) == bool(real.all())
        assert found.key_mask is None or torch.equal(found.key_mask, real)


def test_rows_of_padding_on_the_left_may_see_all():
    """As older versions of transformers have it, to keep a softmax of nothing from being not a number."""
    real = padded(3, 0, 9)
    mask = written(Structure(1, 0, real), 2, 9, 9)
    mask[0, :3] = True
    found = read_mask(mask[:, None])
    assert found[:2] == (1, 0)
    assert torch.equal(found.key_mask, real)


@pytest.mark.parametrize("start", [0, 4, 20])
def test_a_part_of_a_sequence_over_a_static_cache(start):
    """Keys behind the last one that is filled are hidden by causality, those of padding from all."""
    real = padded(2, 0, 40)
    found = read_mask(written(Structure(1, start, real), 2, 16, 40)[:, None])
    assert found[:2] == (1, start)
    rows = slice(0, start + 16)
    assert torch.equal(found.key_mask[:, rows], real[:, rows])
    cut, k, v = found.cut(torch.zeros(2, 1, 16, 4), *torch.zeros(2, 2, 1, 40, 4))
    assert k.shape == v.shape == (2, 1, start + 16, 4)
    assert cut.key_mask.shape == (2, start + 16)


def test_every_mask_of_three_by_three():
    """What is found is what the mask says, but for rows of padding that see nothing or, on the left, all."""
    for bits in itertools.product([False, True], repeat=9):
        rows = torch.tensor(bits).view(1, 3, 3)
        found = read_mask(rows[:, None])
        assert read_mask(additive(rows)[:, None])[:2] == found[:2]
        if found.refusal is not None:
            visible = rows.any(dim=1)
            for structure in (Structure(None, None, visible), *(Structure(c, 0, visible) for c in (1, 2))):
                assert not torch.equal(written(structure, 1, 3, 3), rows)
            continue
        means_nothing = unwanted(found, 3, 3).expand(1, -1)
        assert torch.equal(written(found, 1, 3, 3)[~means_nothing], rows[~means_nothing])
        for row in rows[means_nothing]:
            assert not row.any() or row.all() or any(torch.equal(row, one) for one in written(found, 1, 3, 3)[0])


def test_no_mask_but_those_that_are_built_so_has_a_structure():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        queries, keys = torch.randint(2, 9, (2,), generator=generator).tolist()
        causal = int(torch.randint(1, 5, (), generator=generator))
        mask = written(Structure(causal, 0), 2, queries, keys)
        row, column = (
            int(torch.randint(queries, (), generator=generator)),
            int(torch.randint(keys, (), generator=generator)),
        )
        mask[1, row, column] = ~mask[1, row, column]
        found = read_mask(mask[:, None])
        if found.refusal is None:
            rows = ~unwanted(found, queries, keys).expand(2, -1)
            assert torch.equal(written(found, 2, queries, keys)[rows], mask[rows])


def diagonals(low, high, length=24):
    place = torch.arange(length)
    return ((place >= place[:, None] + low) & (place <= place[:, None] + high))[None, None]


DOCUMENT = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3])


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (diagonals(-7, 0), WINDOW),
        (diagonals(-4, 4), WINDOW),
        (diagonals(-4, 0) & (torch.arange(24) > 4), WINDOW),
        ((DOCUMENT[:, None] == DOCUMENT)[None, None], PARTS),
        ((DOCUMENT[:, None] == DOCUMENT)[None, None] & diagonals(-30, 0), PARTS),
        (diagonals(-30, 0) | (torch.arange(24) < 5), DIFFERS),  # a prefix that all see
        (diagonals(0, 30), DIFFERS),
        (diagonals(1, 30) | diagonals(-30, -1), DIFFERS),
    ],
)
def test_true_reasons(read, mask, reason):
    assert read(mask, 1, 24) == read(additive(mask), 1, 24) == refused(reason)


def test_a_prefix_is_a_long_first_block():
    """What sees a prefix whole and no more is a structure, what is causal behind it none."""
    prefix = torch.arange(24) < 16
    assert read_mask((diagonals(-30, 0) & ~prefix | prefix)[..., :16, :])[:2] == (None, None)
    assert read_mask((prefix | ~prefix[:, None])[None, None]) == Structure(16, 0)


# What is remembered.


class Counting:
    """Counts how often a mask is read."""

    def __init__(self, monkeypatch):
        self.count = 0

        def counted(mask):
            self.count += 1
            return read_mask(mask)

        monkeypatch.setattr(masks, "read_mask", counted)


@pytest.fixture
def counting(monkeypatch):
    return Counting(monkeypatch)


def test_the_layers_of_a_forward_share_one_reading(read, real, counting):
    mask = torch.cat((product(real), torch.ones(B, 1, M, 2, dtype=torch.bool)), dim=3)
    window = diagonals(-2, 0, M)
    for _ in range(4):
        assert torch.equal(read(mask[:, :, :, :M], B, M).key_mask, real)  # every layer makes its own slice
        assert read(window, B, M).refusal == WINDOW  # and every second one has another mask
    assert counting.count == 2
    assert read(mask, B, M + 2).refusal == DIFFERS
    assert counting.count == 3
    mask[:, :, 0, :M] = ~mask[:, :, 0, :M]
    assert read(mask[:, :, :, :M], B, M).refusal == DIFFERS
    assert counting.count == 4


def test_a_mask_that_is_gone_is_not_remembered(read, real, counting):
    for flip in (False, True, False, True):
        wanted = real.flip(1) if flip else real
        assert torch.equal(read(product(wanted), B, M).key_mask, wanted)  # the allocator may give the same memory again
    assert counting.count == 4


def test_old_masks_are_forgotten(read, counting):
    many = [diagonals(-size, 0) for size in range(masks.REMEMBERED + 3)]
    for mask in many:
        read(mask, 1, 24)
    assert len(read._known) == masks.REMEMBERED
    del many, mask
    read(diagonals(-30, 0), 1, 24)
    assert len(read._known) == 1


def test_masks_of_inference_mode(read, real, counting):
    """They do not tell that they were written to: read at every call, or once a forward where those are known."""
    with torch.inference_mode():
        mask = product(real)
        read(mask, B, M)
        mask.fill_(True)
        assert read(mask, B, M) == NO_MASK
        assert counting.count == 2
        for _ in range(2):
            read.start_forward()
            for _ in range(3):
                read(mask[:, :, :, :M], B, M)
            mask[:, :, :2] = False
        assert counting.count == 4
        read.end_forward()
        read(mask[:, :, :, :M], B, M)
        assert counting.count == 5


def test_an_additive_row_is_read_once(read, real, counting):
    mask = additive(real)[:, None, None, :]
    first = read(mask, B, M).key_mask
    assert read(mask, B, M).key_mask.data_ptr() == first.data_ptr()
    assert counting.count == 1


def test_in_a_traced_graph(real):
    torch._dynamo.reset()
    refusals = []

    @torch.compile(fullgraph=True, backend="eager")
    def traced(mask):
        found = MaskReader()(mask, B, M)
        refusals.append(found.refusal)
        return mask if found.key_mask is None else found.key_mask

    assert torch.equal(traced(real[:, None, None, :].expand(-1, -1, N, -1)), real)
    traced(additive(real)[:, None, None, :])
    traced(product(real))
    assert refusals == [None, *["a mask whose values cannot be looked at in a graph"] * 2]
