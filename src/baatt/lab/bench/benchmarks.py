"""Every benchmark by name, and one measurement: verified first, then timed.

In: a `Case`. Out: a `Measurement`, or `VerificationError` before anything is timed. Knows nothing of tables or
pictures.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from baatt.backend import Backend
from baatt.lab.bench.case import Case, Inputs, Measurement, make_inputs, resolve
from baatt.lab.bench.kernel import measure_kernel
from baatt.lab.bench.operator import measure_operator
from baatt.lab.bench.timing import matrix_peak_tflops, memory_bandwidth
from baatt.lab.records import RecordFile, provenance

#: Fields of a stored report.
REPORT = ("command", "commit", "device", "versions", "matrix_peak_tflops", "matrix_peak_dtype", "memory_bandwidth")

#: name -> verifies and measures a case. A new benchmark is a file beside `operator.py` and a line here.
BENCHMARKS: dict[str, Callable[[Case, Backend, Inputs], Measurement]] = {
    "operator": measure_operator,
    "kernel": measure_kernel,
}


def measure(case: Case) -> Measurement:
    """Verify, then time.

    Raises:
        VerificationError: the output is out of budget; nothing was timed.
        RuntimeError: the implementation cannot run this.
    """
    backend = resolve(case)
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
    return BENCHMARKS[case.what](case, backend, make_inputs(case))


def start_report(command: str, device: torch.device, dtype: torch.dtype, path: Path | None = None) -> RecordFile:
    """A file for measurements, with `REPORT` as its header: measures the machine's ceilings, which takes seconds.

    matrix_peak_tflops: of a large product in `matrix_peak_dtype`; memory_bandwidth: bytes per second of a large copy.
    """
    ceilings = {
        "matrix_peak_tflops": matrix_peak_tflops(device, dtype),
        "matrix_peak_dtype": str(dtype).removeprefix("torch."), "memory_bandwidth": memory_bandwidth(device),
    }  # fmt: skip
    return RecordFile(path, provenance(command, device) | ceilings)
