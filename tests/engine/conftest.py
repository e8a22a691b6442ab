"""The engine's tests run in fp64 on one core unless they say otherwise."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("engine", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("engine")
