"""For every test: no GPU, one thread, no hub, and nothing of the user's own environment."""

import os

for name in list(os.environ):
    if name.startswith("GRPO_GUARD_") or name.lower().endswith("_proxy") or name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before imports

import torch  # noqa: E402

torch.set_num_threads(1)
