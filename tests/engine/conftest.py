"""The engine's tests run on one core, in fp64 unless they say otherwise."""

import torch

torch.set_num_threads(1)
