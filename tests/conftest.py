"""Settings for all tests."""

import os

import torch

# Without a GPU Triton's interpreter runs the kernels: chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Two threads wait for each other after every small layer. Where another program takes one of the
# cores, that wait made test_smollm2.py eight times slower; on a quiet machine one thread costs
# little.
torch.set_num_threads(1)
