"""Ranks of a training run: the mean of gradients, the first one's numbers, sums; and one alone."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch

TRAINING = Path(__file__).parents[2] / "training"
sys.path.insert(0, str(TRAINING))

from averaging import add_up, agree, average_gradients  # noqa: E402

from baatt.lab.ranks import Ranks, leave_process_group  # noqa: E402
from tests.processes import START  # noqa: E402


def work(rank: int, port: int, results: "torch.multiprocessing.Queue") -> None:
    """One of two processes: gradients 1 + rank and 10 * (1 + rank), numbers and counts of its own."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    ranks = Ranks()
    parameters = [torch.zeros(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True)]
    for parameter, value in zip(parameters, (1.0, 10.0), strict=True):
        parameter.grad = torch.full_like(parameter, value * (1 + rank))
    average_gradients(ranks, parameters)
    counts = add_up(ranks, torch.tensor([1.0, rank]))
    results.put(
        (rank, [p.grad.tolist() for p in parameters], agree(ranks, [rank + 0.5], torch.device("cpu")), counts.tolist())
    )
    leave_process_group()


def test_two_processes() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context(START)
    results = context.Queue()
    workers = [context.Process(target=work, args=(rank, free_port, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = sorted(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    for rank, gradients, agreed, counts in found:
        assert rank in (0, 1)
        assert gradients == [[[1.5] * 3] * 2, [15.0] * 4]
        assert agreed == [0.5]
        assert counts == [2.0, 1.0]


def test_one_process_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = Ranks()
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.ones(2)
    average_gradients(ranks, [parameter])
    assert (ranks.rank, ranks.size) == (0, 1)
    assert parameter.grad.tolist() == [1, 1]
    assert agree(ranks, [3.0], torch.device("cpu")) == [3.0]
    assert add_up(ranks, torch.tensor([4.0])).tolist() == [4.0]
    leave_process_group()
