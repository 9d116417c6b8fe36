import pytest
import torch

from spectrumkv.bench.methods.method import Prompt
from spectrumkv.bench.methods.selection import Choice  # noqa: F401  # registers all baselines
from spectrumkv.bench.methods.served_model import ServedModel
from spectrumkv.bench.peers.baselines import Baseline, BaselineMethod, baselines
from spectrumkv.bench.peers.pdtrim import best_trim
from tests.services.kv.test_lossless import random_prompt

CONTEXT = 130


@pytest.fixture(scope="module")
def prompt(served: ServedModel) -> Prompt:
    return served.prefill(random_prompt(CONTEXT))


def installed(name: str) -> Baseline:
    baseline = baselines.get(name)
    if not baseline.installed:
        pytest.skip(f"{baseline.requires} is not installed")
    return baseline


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", baselines.names())
def test_every_slot_is_filled_and_bytes_fit_the_budget(served: ServedModel, prompt: Prompt, name: str) -> None:
    baseline = installed(name)
    budget = baseline.min_budget if baseline.fixed else 0.4
    geometry = served.loaded.geometry
    fp16 = geometry.fp16_bytes(CONTEXT)
    with served.receive(BaselineMethod(baseline, budget), prompt) as (context, sent):
        allocation = context.allocation
        for layer in prompt.captured.layers:
            kept = allocation.keep_mask(layer.layer)
            shown = slice(None) if kept is None else kept[:CONTEXT]
            for states, slots in ((layer.keys, allocation.keys), (layer.values, allocation.values)):
                received = slots(layer.layer, 0, CONTEXT)
                assert received.isfinite().all()
                error = (received - states)[:, shown].square().mean().sqrt() / states.square().mean().sqrt()
                assert error < (1e-3 if baseline.codec == "fp16" else 0.75)
    # Scales and zero points come on top of the nominal budget: two numbers for 64 elements at most.
    assert budget - 0.02 <= sent.counted / fp16 <= budget + 2 / 64 + 1e-6
    # What is coded between the tiers counts as the nearest one.
    assert sent.budget_nominal == pytest.approx(budget, abs=0.02)


def test_int3_is_the_absmax_quantizer(served: ServedModel, prompt: Prompt) -> None:
    with served.receive(BaselineMethod(baselines.get("uniform-int3"), 0.1875), prompt) as (context, sent):
        received = context.allocation.keys(1, 0, CONTEXT).clone()
    keys = prompt.captured.layers[1].keys
    for head, token in ((0, 0), (1, 7), (1, CONTEXT - 1)):
        row = keys[head, token]
        scale = float((row.abs().max() / 3).half())
        expected = torch.tensor([max(-3, min(3, round(float(one) / scale))) * scale for one in row])
        torch.testing.assert_close(received[head, token], expected)
    elements, rows = 2 * keys.numel(), 2 * keys[..., 0].numel()
    assert sent.counted == served.loaded.geometry.layers * (elements * 3 / 8 + rows * 2)


@pytest.mark.parametrize("budget", [0.05, 0.3, 0.5, 0.77, 0.99, 1.0])
def test_pdtrim_keeps_to_its_budget_and_trims_the_ends_last(budget: float) -> None:
    layers, tokens = 6, 200
    observed = torch.rand(layers, tokens, generator=torch.Generator().manual_seed(3))
    trim = best_trim(observed, budget)
    kept = len(trim.layers) * (trim.first + trim.last) + (layers - len(trim.layers)) * tokens
    assert kept <= budget * layers * tokens + 1e-6
    assert kept > budget * layers * tokens - layers
    lost = sum(
        float(observed[one, trim.first : tokens - trim.last].sum() / observed[one].sum()) for one in trim.layers
    )
    assert trim.lost == pytest.approx(lost, abs=1e-5)


def test_pdtrim_spares_layers_that_look_at_the_middle() -> None:
    observed = torch.full((4, 100), 1e-4)
    observed[:, :4] = observed[:, -4:] = 1.0
    observed[2, 40:60] = 1.0
    trim = best_trim(observed, 0.5)
    assert trim.layers
    assert 2 not in trim.layers
    # The slots that it does not keep are the middle's.
    assert trim.first >= 4
    assert trim.last >= 4
