"""One torch thread: the tests' tensors are small, and two threads that wait for each other are slower on two cores."""

import torch

torch.set_num_threads(1)
