"""benchmarks/cpu_operator.py on a small shape: it verifies, times and stores what the tables are made from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_stores_a_complete_record(tmp_path):
    target = tmp_path / "record.json"
    command = ["benchmarks/cpu_operator.py", "--shape", "1x2x600x16", "--sparsity", "0.5,0.75", "--json", str(target)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, timeout=120)
    record = json.loads(target.read_text())
    assert {"command", "commit", "device", "versions", "what", "shape", "dtype", "records"} <= record.keys()
    assert [one["sparsity"] for one in record["records"]] == [0.5, 0.75]
    for one in record["records"]:
        assert list(one["stage_ms"]) == ["arrange", "score", "select", "attend"]
        assert one["speedup"] == one["dense_ms"] / one["total_ms"]
        assert {"config", "error", "peak_memory_bytes", "extra_memory_ratio"} <= one.keys()
