"""python -m pytest tests/test_compile_kernels.py: the kernels compile for GPUs that are not there.

The interpreter of test_attention.py forgives what a GPU does not: too many registers, too much
shared memory. Here the operators run with their real tiles, but where they would launch a kernel it
is compiled for an A100 (sm_80) or an H100 (sm_90), in a process of its own without the interpreter:

    python tests/test_compile_kernels.py 90 [all]      prints registers and bytes of every kernel
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is for Linux")
ROOT = Path(__file__).parent.parent
SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes a program may use
MULTIPLY = {80: "mma.sync", 90: "wgmma.mma_async"}  # the tensor cores' instruction
WIDTHS, MASKS = (64, 128, 256), ("none", "causal", "documents")
# One of each row of TILES, and what LLaVA runs.
HALF = [(width, mask) for width in WIDTHS for mask in MASKS if mask != "none" or width == 64]
CASES = {"bfloat16": HALF, "float32": [(128, "causal")]}
ALL = {kind: [(w, m) for w in (*WIDTHS, 32, 80) for m in MASKS] for kind in (*CASES, "float16")}


def compile_all(arch: int, cases: dict):
    """Print one JSON line for every kernel that the cases launch."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.compiler import compile as compile_kernel
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from kernels import attention as file
    from kernels import rounded
    from quantize import QuantizedLinear

    target, done = GPUTarget("cuda", arch, 32), set()
    backend = make_backend(target)

    def compile_instead(self, *args, grid, warmup, **options):
        # What a launch does up to the compiler: types, divisibility by 16, constants.
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, _ = binder(*args, **options)
        options, *parts = self._pack_args(backend, options, bound, specialization, options)
        source = ASTSource(self, *parts)
        if source.hash() in done:
            return
        done.add(source.hash())
        kernel = compile_kernel(source, target=target, options=options.__dict__)
        report = dict(kernel=self.__name__, width=width, mask=mask, dtype=dtype, **usage(kernel))
        report["products"] = kernel.asm["ptx"].count(MULTIPLY[arch])
        print(json.dumps(report), flush=True)

    JITFunction.run = compile_instead
    file.generation = lambda q: arch // 10
    for dtype, pairs in cases.items():
        for width, mask in pairs:
            q, k, v = (
                torch.empty(1, 1024, n, width, dtype=getattr(torch, dtype)).transpose(1, 2)
                for n in (16, 8, 8)
            )
            documents = None
            if mask == "documents":
                documents = torch.empty(1, 2, 1024, dtype=torch.int32)
            rest = documents, mask != "none", 1.0
            out, lse = file.forward(q, k, v, *rest)
            file.backward(out, q, k, v, out, lse, *rest)
            if mask != "none":
                file.forward(q[:, :, :1], k, v, *rest)  # decoding
        mask = "product"
        for width in (8, 4) if dtype != "float32" else ():  # bits; float32 is for tests
            layer = QuantizedLinear(torch.empty(4096, 1024, dtype=torch.bfloat16), width)
            x = torch.empty(1, 1024, dtype=getattr(torch, dtype))
            rounded.multiply(x, layer.q, layer.scale, layer.mid, width)


def usage(kernel) -> dict:
    """Registers a thread, bytes of its stack, bytes of shared memory, warps."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    found = {name.lower(): int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", said.stdout)}
    return dict(**found, shared=kernel.metadata.shared, warps=kernel.metadata.num_warps)


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_spills_within_shared_memory_for_tensor_cores(arch):
    done = subprocess.run(
        [sys.executable, __file__, str(arch)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    print(done.stdout)
    kernels = {report["kernel"].removesuffix("_kernel") for report in reports}
    backward = {"delta", "backward_queries", "backward_keys"}
    assert kernels == {"forward", "split", "merge", "product"} | backward
    for report in reports:
        # Of tiles of 16 rows wgmma, which takes 64, cannot make use.
        small = report["kernel"] in ("split_kernel", "product_kernel")
        multiplies = report["kernel"] not in ("delta_kernel", "merge_kernel") and not small
        exact = report["dtype"] == "float32"  # on ordinary cores, a word or two of stack is let be
        assert report["stack"] <= (32 if exact else 0), report
        assert report["shared"] <= SHARED_MEMORY[arch], report
        assert exact or not multiplies or report["products"], report


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    compile_all(int(sys.argv[1]), ALL if "all" in sys.argv else CASES)
