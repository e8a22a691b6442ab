"""One thread in every test: two on busy cores are slower, and some kernels round by how many there are."""

import torch

torch.set_num_threads(1)
