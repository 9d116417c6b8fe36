"""What runs at start launches every kernel that a request will."""

import pytest
import torch

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.warm_up import TRIAL_TOKENS, decode_once, encode_once
from tests.simulated_gpu import GPU, simulated_gpu

GEOMETRY = KvGeometry(layers=1, kv_heads=2, head_dim=16, native_dtype=torch.float16)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_prefill_launches_all_kernels_that_score_place_and_code() -> None:
    with simulated_gpu() as work:
        queries, keys, values = (torch.ones(heads, 8, 16, dtype=torch.float16).to(GPU) for heads in (4, 2, 2))
        encode_once([LayerCapture(queries, keys, values, 0.25, None, None, 0)], GEOMETRY)
    kernels = {name for name in work.launches if name.endswith("_kernel")}
    fixed_rate = {"analyse_kernel", "statistics_kernel", "pack_kernel"}
    of_tiers = {"_softmax_kernel", "_scores_kernel", "_place_kernel", "absmax_kernel", "native_kernel"}
    assert kernels == of_tiers | fixed_rate


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_decode_launches_all_kernels_that_write_slots() -> None:
    with simulated_gpu() as work:
        slots = torch.full((2, 2, TRIAL_TOKENS + 9, 16), torch.nan, dtype=torch.float16).to(GPU)
        decode_once(*slots[:, :, 3 : 3 + TRIAL_TOKENS], GEOMETRY)
        written = slots.cpu()
    kernels = {name for name in work.launches if name.endswith("_kernel")}
    assert kernels == {"absmax_kernel", "native_kernel", "unpack_kernel", "synthesise_kernel"}
    assert (written[:, :, 3 : 3 + TRIAL_TOKENS] == 0).all()
    assert written.isnan().sum() == 2 * 2 * 9 * 16
