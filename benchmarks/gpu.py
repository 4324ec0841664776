"""What the benchmarks on a GPU share: clocks, ceilings, and what the machine is."""

import statistics
import subprocess

import torch

ROUNDS = 15
DATASHEET = 990e12, 4.8e12  # H200: bf16 operations and bytes a second, where nothing is measured
CACHE = 256e6  # bytes of input to walk through, more than any L2 holds


def seconds(work) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measured_ceilings() -> tuple[float, float]:
    """Operations a second of a large bf16 product, bytes a second of a large copy."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    product = statistics.median(seconds(lambda: a @ b) for _ in range(ROUNDS))
    copy = statistics.median(seconds(lambda: target.copy_(source)) for _ in range(ROUNDS))
    return 2 * 8192**3 / product, 8 * 2**30 / copy


def machine() -> dict:
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return dict(
        gpu=torch.cuda.get_device_name(),
        driver=driver[0] if driver else "unknown",
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        triton=triton.__version__,
    )
