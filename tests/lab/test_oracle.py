"""Block mass, the oracle's selection and recall against dense attention in fp64, entry by entry."""

import dataclasses
import math

import pytest
import torch

from baatt import make_plan
from baatt.lab.recall import block_mass, kept_mass
from baatt.scores import exact
from baatt.types import BlockSelection
from tests.settings import sorted_config


def case(sort="qk", sparsity=0.5, masked=True, batch=2):
    generator = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(batch, 4, 75, 16, generator=generator, dtype=torch.float64)
    k = 2 * torch.randn(batch, 2, 101, 16, generator=generator, dtype=torch.float64)
    mask = None
    if masked:
        mask = torch.rand(batch, 101, generator=generator) > 0.3
        mask[-1] = False
        k[~mask[:, None].expand(batch, 2, 101)] = math.nan
    plan = make_plan(q, k, sorted_config(16, sparsity, sort, 32), key_mask=mask, impl="reference")
    return q, k, plan


def naive_mass(q, k, plan):
    size, mass = plan.config.block_size, torch.zeros(*q.shape[:2], 5, 7, dtype=torch.float64)
    for entry in range(q.shape[0]):
        length = int(plan.key_order.length[entry])
        for head in range(4):
            rows = plan.query_order.index[entry, head]
            columns = plan.key_order.index[entry, head // 2, :length]
            if length == 0:
                continue
            weights = (plan.scale * q[entry, head, rows] @ k[entry, head // 2, columns].T).softmax(-1)
            for i in range(5):
                for j in range(-(-length // size)):
                    part = weights[i * size : (i + 1) * size, j * size : (j + 1) * size]
                    mass[entry, head, i, j] = part.sum() / len(part)
    return mass


@pytest.mark.parametrize("slab", [1, 2000, 2**25])
@pytest.mark.parametrize("sort", ["none", "qk"])
def test_block_mass(sort, slab, monkeypatch):
    monkeypatch.setattr(exact, "SLAB_WEIGHTS", (slab, slab))
    q, k, plan = case(sort)
    mass = block_mass(q, k, plan)
    torch.testing.assert_close(mass, naive_mass(q, k, plan))
    torch.testing.assert_close(mass[0].sum(-1), torch.ones(4, 5, dtype=torch.float64))
    assert (mass[1] == 0).all()  # an entry without keys


def test_implementations():
    q, k, plan = case()
    assert torch.equal(block_mass(q, k, plan), block_mass(q, k, plan, impl="reference"))
    with pytest.raises(ValueError, match=r"impl must be one of \['auto', 'reference', 'triton'\], got 'cpu'"):
        block_mass(q, k, plan, impl="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="impl='triton' cannot run: it needs tensors on a GPU"):
            block_mass(q, k, plan, impl="triton")


def test_no_selection_keeps_more_than_the_best():
    q, k, plan = case(masked=False)
    mass = block_mass(q, k, plan)
    best, all_blocks = (
        make_plan(q, k, dataclasses.replace(plan.config, score="oracle", sparsity=sparsity), impl="reference").selection
        for sparsity in (0.5, 0.0)
    )
    assert torch.equal(best.count, plan.selection.count)
    shares, others = kept_mass(mass, best), kept_mass(mass, plan.selection)
    torch.testing.assert_close(shares, mass.sort(descending=True).values[..., :4].sum(-1))
    assert (others <= shares + 1e-12).all()
    assert (others < shares).any()
    torch.testing.assert_close(kept_mass(mass, all_blocks), torch.ones_like(shares))


def test_slots_beyond_the_count_keep_nothing():
    mass = torch.tensor([[[[0.5, 0.3, 0.2]]]])
    selection = BlockSelection(torch.tensor([[[[1, 1, 1]]]]).int(), torch.tensor([[[1]]]).int())
    assert kept_mass(mass, selection).tolist() == [[[pytest.approx(0.3)]]]
    assert kept_mass(mass, selection._replace(count=torch.tensor([[[0]]]))).tolist() == [[[0.0]]]
