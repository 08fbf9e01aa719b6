"""What the fork server imports once, before it forks ranks."""

import contextlib

import torch

torch.set_num_threads(1)

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401  (deepspeed.initialize imports it: seconds)
import sklearn.datasets  # noqa: E402, F401

import fd_scale.api  # noqa: E402, F401

with contextlib.suppress(ImportError):  # the extra [hf] is missing
    import transformers.models.mask2former.modeling_mask2former  # noqa: F401  (seconds)
