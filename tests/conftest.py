"""For every test: no GPU, one thread, no hub, and none of the user's own reward servers."""

import os

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before imports

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_servers(monkeypatch):
    for name in [name for name in os.environ if name.startswith("GRPO_GUARD_")]:
        monkeypatch.delenv(name)
