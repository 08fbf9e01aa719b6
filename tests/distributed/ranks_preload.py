"""What the fork server imports once, before it forks ranks."""

import contextlib
import gc

import torch

torch.set_num_threads(1)

import bench_cases  # noqa: E402, F401
import cases  # noqa: E402, F401
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401  (deepspeed.initialize imports it: seconds)
import detection_cases  # noqa: E402, F401
import parts_cases  # noqa: E402, F401
import sklearn.datasets  # noqa: E402, F401

with contextlib.suppress(ImportError):  # the extra [hf] is missing
    import transformers.models.mask2former.modeling_mask2former  # noqa: F401  (seconds)

# DeepSpeed collects garbage in many places: half a second each where it looks at all of these libraries.
gc.freeze()
