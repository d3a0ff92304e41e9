"""What importing the adapters needs and leaves behind, in one new process: no library, no registered name."""

import importlib.util
from pathlib import Path

from tests.processes import run_code

WITHOUT_LIBRARIES = """
import sys, torch, baatt
from baatt.integrations import diffusers, enable, transformers
from tests.integrations.stubs import DreamModel, LLaDAModelLM

for adapter in (diffusers, transformers):
    assert not adapter.roots(torch.nn.Linear(2, 2))
assert not transformers.roots(1)
config, tokens, total = baatt.BAAttConfig(block_size=16), torch.zeros(1, 40, dtype=torch.int64), 0
for model in (LLaDAModelLM().eval(), DreamModel().eval()):
    with torch.no_grad(), baatt.enable(model, config) as handle:
        model(tokens)
    total += handle.sparse_calls
assert total == 6
imported = [name for name in ("transformers", "diffusers") if name in sys.modules]
assert not imported, imported
"""
NOTHING_REGISTERED = """
from transformers import masking_utils, modeling_utils

names = [*modeling_utils.AttentionInterface(), *masking_utils.AttentionMaskInterface()]
assert "sdpa" in names and not [name for name in names if "ba_att" in name], names
"""


def test_importing_needs_no_library_and_registers_nothing():
    there = importlib.util.find_spec("transformers") is not None
    code = WITHOUT_LIBRARIES + (NOTHING_REGISTERED if there else "")
    root = Path(__file__).parents[2]
    run = run_code(code, folder=root)
    assert run.returncode == 0, run.stderr
