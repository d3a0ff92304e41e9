"""Exchanges between the ranks of a data-parallel evaluation: alone, and two that a launcher starts."""

import pytest
import torch

from baatt.lab.ranks import Ranks, leave_process_group
from tests.processes import run_module

EXCHANGE = """
import sys
from pathlib import Path
import torch
from baatt.lab.ranks import Ranks, leave_process_group

both = Ranks()
counts = both.all_gather(torch.tensor(10 + both.rank, device=both.device("cpu")))
rows = both.all_gather(torch.full((1, 2), both.rank))
items = both.gather_object({"rank": both.rank})
again = Ranks()  # joins the group that is there
both.barrier()
said = f"{both.rank} {both.size} {again.rank} {counts.tolist()} {rows.tolist()} {items}"
(Path(sys.argv[1]) / str(both.rank)).write_text(said)
leave_process_group()
"""


def test_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Ranks()
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.all_gather(torch.tensor(3)) == 3
    assert alone.gather_object("a") == ["a"]
    alone.barrier()
    leave_process_group()
    assert alone.device("cpu") == torch.device("cpu")
    assert alone.device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match='device must be a device such as "cpu" or "cuda:0", got \'tpu-7\''):
        alone.device("tpu-7")


def test_two(tmp_path):
    (tmp_path / "exchange.py").write_text(EXCHANGE)
    asked = "--standalone", "--nproc_per_node", "2", str(tmp_path / "exchange.py"), str(tmp_path)
    run = run_module("torch.distributed.run", *asked)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "0").read_text() == "0 2 0 [10, 11] [[0, 0], [1, 1]] [{'rank': 0}, {'rank': 1}]"
    assert (tmp_path / "1").read_text() == "1 2 1 [10, 11] [[0, 0], [1, 1]] None"
