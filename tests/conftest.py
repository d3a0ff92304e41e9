"""One torch thread: the tests' tensors are small, and two threads that wait for each other are slower on two cores.

Without a GPU, Triton kernels run in Triton's interpreter, which has to be chosen before Triton is imported.
"""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
