"""Attention masks of every shape: which amount to a key mask, which do not and why, and what is remembered of them."""

import itertools

import pytest
import torch

from baatt.integrations import masks
from baatt.integrations.masks import NO_MASK, KeyMaskReader, as_key_mask

B, H, N, M = 3, 2, 5, 7
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def real():
    """A key mask with padding on the left, the right and inside; one entry without any."""
    real = torch.ones(B, M, dtype=torch.bool)
    real[0, :2], real[1, -3:], real[1, 2] = False, False, False
    return real


@pytest.fixture(params=["as_key_mask", "KeyMaskReader"])
def read(request):
    return as_key_mask if request.param == "as_key_mask" else KeyMaskReader()


def additive(real, value=None, dtype=torch.float32):
    value = torch.finfo(dtype).min if value is None else value
    return torch.zeros(real.shape, dtype=dtype).masked_fill(~real, value)


def product(real):
    return real[:, None, :, None] & real[:, None, None, :]


def test_no_mask(read):
    assert read(None, B, M) == NO_MASK == (None, None)


def forms(mask):
    """The ways of writing [B, M] for attention, none of which copies it for every query."""
    rows = mask[:, None, None, :]
    yield rows
    yield rows.expand(-1, H, -1, -1)
    yield rows.expand(-1, -1, N, -1)
    yield rows.expand(-1, H, N, -1)


def test_bool_key_masks(read, real):
    for mask in (real, *forms(real)):
        found = read(mask, B, M)
        assert found.refusal is None
        assert torch.equal(found.mask, real)


def test_a_mask_for_all_batch_entries(read, real):
    for mask in (real[:1], *forms(real[:1]), *forms(additive(real[:1]))):
        found = read(mask, B, M)
        assert found.mask.shape == (B, M)
        assert torch.equal(found.mask, real[:1].expand(B, M))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [None, -torch.inf, -65504.0, -1e4], ids=str)
def test_additive_key_masks(read, real, dtype, value):
    for mask in forms(additive(real, value, dtype)):
        found = read(mask, B, M)
        assert found.refusal is None
        assert torch.equal(found.mask, real)


@pytest.mark.parametrize("value", [-9999.0, -1.0, 1e-3, 1.0, torch.inf, torch.nan])
def test_weights_are_not_a_key_mask(read, real, value):
    for mask in forms(additive(real, value)):
        assert read(mask, B, M) == (None, "an additive mask with weights")
    written_out = additive(real, value)[:, None, None, :].repeat(1, 1, N, 1)
    assert KeyMaskReader()(written_out, B, M) == (None, "an additive mask with weights")


def test_entries_without_any_key(read, real):
    real[2] = False
    for mask in (*forms(real), *forms(additive(real))):
        assert torch.equal(read(mask, B, M).mask, real)


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
        (torch.ones(B, H, 1, M, dtype=torch.bool), "a mask that differs between heads"),
        (torch.ones(B, H, N, M, dtype=torch.bool), "a mask that differs between heads"),
        (torch.ones(B, 1, N, M, dtype=torch.bool).tril(), "a mask that differs between queries"),
    ],
)
def test_no_key_masks(read, mask, refusal):
    assert read(mask, B, M) == (None, refusal)


def test_rows_are_compared_by_the_reader_only(real):
    mask = real[:, None, None, :].repeat(1, 1, N, 1)
    assert as_key_mask(mask, B, M) == (None, "a mask that differs between queries")
    assert torch.equal(KeyMaskReader()(mask, B, M).mask, real)


@pytest.mark.parametrize("chunk", [1, 50, masks.CHUNK])
@pytest.mark.parametrize("make", [torch.Tensor.bool, additive], ids=["bool", "additive"])
def test_masks_written_out_for_every_query(real, monkeypatch, chunk, make):
    monkeypatch.setattr(masks, "CHUNK", chunk)
    read = KeyMaskReader()
    for mask in (real[:, None, None, :].repeat(1, 1, N, 1), product(real)):
        assert torch.equal(read(make(mask), B, M).mask, real)
        broken = mask.clone()
        broken[1, 0, 3, 1] = ~broken[1, 0, 3, 1]
        assert read(make(broken), B, M) == (None, "a mask that differs between queries")
    for mask in (torch.ones(N, M).tril(), (torch.arange(N)[:, None] // 2 >= torch.arange(M) // 2)):
        assert read(make(mask.bool().expand(B, 1, N, M)), B, M) == (None, "a mask that differs between queries")


def test_every_mask_of_three_by_three():
    """Against the definition: all rows alike, or those of padding empty and the others alike."""
    read = KeyMaskReader()
    for bits in itertools.product([False, True], repeat=9):
        rows = torch.tensor(bits).view(3, 3)
        visible = rows.any(dim=0)
        expected = bool((rows == visible).all()) or torch.equal(rows, visible[:, None] & visible)
        for mask in (rows, additive(rows)):
            found = read(mask[None, None], 1, 3)
            assert (found.refusal is None) == expected
            assert not expected or torch.equal(found.mask, visible[None])


def test_empty_rows_need_as_many_queries_as_keys(real):
    mask = product(real)[:, :, :N]
    assert KeyMaskReader()(mask, B, M).refusal == "a mask that differs between queries"


def test_entries_of_a_batch_may_differ_in_kind(real):
    mask = product(real)
    mask[0] = real[0]
    assert torch.equal(KeyMaskReader()(mask, B, M).mask, real)


class Counting:
    """Counts how often rows are compared."""

    def __init__(self, monkeypatch):
        self.count = 0
        compare = masks._compare_rows

        def counted(mask):
            self.count += 1
            return compare(mask)

        monkeypatch.setattr(masks, "_compare_rows", counted)


def test_the_layers_of_a_forward_share_one_comparison(real, monkeypatch):
    counting, read = Counting(monkeypatch), KeyMaskReader()
    mask = torch.cat((product(real), torch.ones(B, 1, M, 2, dtype=torch.bool)), dim=3)
    for _ in range(4):
        assert torch.equal(read(mask[:, :, :, :M], B, M).mask, real)  # every layer makes its own slice
    assert counting.count == 1
    assert read(mask, B, M + 2).refusal == "a mask that differs between queries"
    assert counting.count == 2
    mask[:, :, 0, :M] = ~mask[:, :, 0, :M]
    assert read(mask[:, :, :, :M], B, M).refusal == "a mask that differs between queries"
    assert counting.count == 3


def test_a_mask_that_is_gone_is_not_remembered(real, monkeypatch):
    counting, read = Counting(monkeypatch), KeyMaskReader()
    for flip in (False, True, False, True):
        wanted = real.flip(1) if flip else real
        assert torch.equal(read(product(wanted), B, M).mask, wanted)  # the allocator may give the same memory again
    assert counting.count == 4
    with torch.inference_mode():
        mask = product(real)
        read(mask, B, M)
        mask.fill_(True)  # leaves no trace in a version
        assert bool(read(mask, B, M).mask.all())


def test_an_additive_row_is_read_once(real, monkeypatch):
    read, mask = KeyMaskReader(), additive(real)[:, None, None, :]
    first = read(mask, B, M).mask
    assert read(mask, B, M).mask.data_ptr() == first.data_ptr()


def test_in_a_traced_graph(real):
    torch._dynamo.reset()
    refusals = []

    @torch.compile(fullgraph=True, backend="eager")
    def traced(mask):
        found = KeyMaskReader()(mask, B, M)
        refusals.append(found.refusal)
        return mask if found.mask is None else found.mask

    assert torch.equal(traced(real[:, None, None, :].expand(-1, -1, N, -1)), real)
    traced(additive(real)[:, None, None, :])
    traced(product(real))
    assert refusals == [None, "an additive mask in a compiled graph", "a mask that differs between queries"]
