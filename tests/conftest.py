"""Tiny models are fastest on one thread, and two test processes do not disturb each other then."""

import torch

torch.set_num_threads(1)
