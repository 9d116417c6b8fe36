"""Finds a model's calibrated basis, once per model: a minute at deployment.

For some texts, prefill computes the prompt's exact KV, and then the gradient, with respect to that KV, of the
log-probability of a continuation. The continuation is drawn from the model itself, so that the mean of the gradients'
outer products is the Fisher information: to second order it says how far a small error in the KV moves the predicted
distribution in KL divergence (Martens, "New Insights and Perspectives on the Natural Gradient Method", JMLR 21:146,
2020, section 5). Its square root is the metric in which errors of all coefficients count alike. The Karhunen-Loève
transform in that metric gathers the variance in few coefficients, as transform coding wants it (Goyal, "Theoretical
Foundations of Transform Coding", IEEE Signal Processing Magazine 18:5, 2001, section "Karhunen-Loève transforms").
How sensitivity grows with a token's attention (`_attention_exponent`) is this project's own measurement.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.codecs.calibrated.basis import SIDES, CalibratedBasis, angles, rotate
from spectrumkv.common.kv.scoring import SINK_TOKENS, mean_attention
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.model.support import rope_prefixes
from spectrumkv.common.service.config import SCORE_WINDOW
from spectrumkv.kernels.logits import causal_mask, soft_cap
from spectrumkv.prefill_server.engine.attention import ATTENTION_NAME
from spectrumkv.prefill_server.tuning.replay import capture_prompt

CONTINUATION_ATTENTION = "spectrumkv_continuation"
# Weight of a multiple of the identity in the Fisher information, since that is estimated from few tokens: the form of
# Ledoit and Wolf ("A well-conditioned estimator for large-dimensional covariance matrices", 2004), at a fixed weight.
SHRINKAGE = 0.05
# Machines compute the same rotary frequencies but for the last bits of float32.
ROTARY_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Excerpt:
    """Holds a stretch of text for calibration.

    Attributes:
        token_ids: int64 `[context + continuation]`.
        context: how many of these tokens are the prompt.
    """

    token_ids: torch.Tensor
    context: int


@dataclass
class LayerSample:
    """Holds what one excerpt shows of one layer, without the sinks.

    Attributes:
        states: float32 `[2, kv_heads, n, head_dim]`, keys before the rotary embedding, and values.
        gradients: like `states`: of the log-probability of the drawn continuation.
        attention: float32 `[n]`, attention that the last queries give to each token, mean over the KV heads.
    """

    states: torch.Tensor
    gradients: torch.Tensor
    attention: torch.Tensor


def calibrate(loaded: LoadedModel, excerpts: list[Excerpt], on_excerpt: Callable[[int], None]) -> CalibratedBasis:
    """Find the basis.

    Args:
        loaded: the model; its attention is switched to prefill's.
        excerpts: texts like those that will be served; a few thousand tokens in all.
        on_excerpt: called after each excerpt with the number of excerpts done.

    Returns:
        The basis of all layers, in float32 on the CPU.
    """
    loaded.model.set_attn_implementation(ATTENTION_NAME)
    frequencies, scaling = rotary_parameters(loaded.model)
    samples: list[list[LayerSample]] = []
    for number, excerpt in enumerate(excerpts, start=1):
        samples.append(list(_observe(loaded, excerpt, number, frequencies, scaling)))
        on_excerpt(number)
    layers = [_layer_basis([sample[layer] for sample in samples]) for layer in range(loaded.geometry.layers)]
    mean, analysis, std, exponent = (torch.stack(list(column)) for column in zip(*layers, strict=True))
    return CalibratedBasis(mean, analysis, std, exponent, frequencies, scaling)


def check_rotation(basis: Basis, loaded: LoadedModel) -> None:
    """Refuse a basis that was found for a model of the same shape with other rotary embeddings.

    Args:
        basis: that fits the model's cache.
        loaded: the model.

    Raises:
        InvalidArgumentError: calibration finds no such basis for this model.
    """
    if not isinstance(basis, CalibratedBasis):
        raise InvalidArgumentError(f"calibration finds no basis of type {type(basis).__name__}; export another one")
    frequencies, scaling = rotary_parameters(loaded.model)
    pairs = ((basis.rope_frequencies, frequencies), (basis.rope_scaling, scaling))
    if not all(torch.allclose(theirs, ours, rtol=ROTARY_TOLERANCE, atol=0.0) for theirs, ours in pairs):
        raise InvalidArgumentError(
            f"the basis is for a model with other rotary frequencies than {loaded.name}; export it for the same model"
        )


def rotary_parameters(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotary frequencies of a model's layers, and their factors on keys.

    Args:
        model: of a supported type.

    Returns:
        Frequencies in radians per position, float64 `[layers, head_dim / 2]`, and factors, float64 `[layers]`, both
        on the CPU.
    """
    rotary = model.model.rotary_emb
    prefixes = rope_prefixes(model.config)
    frequencies = [getattr(rotary, f"{prefix}inv_freq").detach().double().cpu() for prefix in prefixes]
    scaling = [float(getattr(rotary, f"{prefix}attention_scaling")) for prefix in prefixes]
    return torch.stack(frequencies), torch.tensor(scaling, dtype=torch.float64)


def _observe(
    loaded: LoadedModel, excerpt: Excerpt, seed: int, frequencies: torch.Tensor, scaling: torch.Tensor
) -> Iterator[LayerSample]:
    """Yield what an excerpt shows of each layer, from the first to the last."""
    context = excerpt.token_ids[: excerpt.context].tolist()
    captured = capture_prompt(loaded.model, context, SCORE_WINDOW)
    captures: list[LayerCapture] = list(captured.layers)
    prefix = [(one.keys.clone().requires_grad_(), one.values.clone().requires_grad_()) for one in captures]
    _draw_and_differentiate(loaded, excerpt, prefix, seed)
    for capture, (keys, values), of_layer, factor in zip(
        captures, prefix, frequencies.tolist(), scaling.tolist(), strict=True
    ):
        assert keys.grad is not None
        assert values.grad is not None
        cosine, sine = angles(tuple(of_layer), 0, len(context))
        unrotated = rotate(keys.detach().float().cpu(), cosine, -sine) / factor
        # The chain rule turns the division into a product.
        unrotated_gradient = rotate(keys.grad.float().cpu(), cosine, -sine) * factor
        yield LayerSample(
            states=torch.stack([unrotated, values.detach().float().cpu()])[:, :, SINK_TOKENS:],
            gradients=torch.stack([unrotated_gradient, values.grad.float().cpu()])[:, :, SINK_TOKENS:],
            attention=mean_attention(capture).cpu()[SINK_TOKENS:],
        )


def _draw_and_differentiate(
    loaded: LoadedModel, excerpt: Excerpt, prefix: list[tuple[torch.Tensor, torch.Tensor]], seed: int
) -> None:
    """Leave in `prefix` the gradients of the log-probability of tokens that are drawn from the model itself."""
    continuation = excerpt.token_ids[excerpt.context :].to(loaded.device)
    positions = torch.arange(excerpt.context, len(excerpt.token_ids), device=loaded.device)
    with _continuing(loaded.model), torch.enable_grad():
        logits = loaded.model(
            input_ids=continuation[None], position_ids=positions[None], use_cache=False, prefix=prefix
        ).logits[0]
        logprobs = logits.float().log_softmax(dim=-1)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(logprobs.detach().exp().cpu(), 1, generator=generator).to(loaded.device)
        logprobs.gather(1, drawn).sum().backward()


@contextmanager
def _continuing(model: PreTrainedModel) -> Iterator[None]:
    model.set_attn_implementation(CONTINUATION_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def _attend_to_prefix(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prefix: list[tuple[torch.Tensor, torch.Tensor]],
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the prefix of this layer and, causally, over the continuation itself, so that gradients flow.

    Returns:
        `[1, n, query_heads, head_dim]`, and None in place of attention weights.
    """
    prefix_keys, prefix_values = prefix[int(module.layer_idx)]  # type: ignore[arg-type]
    keys = torch.cat([prefix_keys, key[0]], dim=1)
    values = torch.cat([prefix_values, value[0]], dim=1)
    kv_heads, tokens, head_dim = keys.shape
    queries = query.shape[2]
    seen = causal_mask(range(tokens - queries, tokens), tokens, sliding_window, keys.device)
    grouped = query[0].view(kv_heads, -1, queries, head_dim)
    if softcap is None:
        attended = F.scaled_dot_product_attention(
            grouped,
            keys[:, None].expand(-1, grouped.shape[1], -1, -1),
            values[:, None].expand(-1, grouped.shape[1], -1, -1),
            attn_mask=seen,
            scale=scaling,
        )
    else:
        logits = soft_cap(grouped @ keys[:, None].transpose(-1, -2), softcap, scaling=scaling)
        attended = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ values[:, None]
    return attended.reshape(-1, queries, head_dim).transpose(0, 1)[None], None


AttentionInterface.register(CONTINUATION_ATTENTION, _attend_to_prefix)


def _layer_basis(samples: list[LayerSample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return mean, analysis, standard deviations and attention exponent of one layer."""
    states = torch.cat([sample.states for sample in samples], dim=2).double()
    gradients = torch.cat([sample.gradients for sample in samples], dim=2).double()
    attention = torch.cat([sample.attention for sample in samples]).double().clamp_min(1e-7)
    exponent = _attention_exponent(gradients, attention)
    # The gradients as they would be if all tokens drew the same attention.
    relative = (attention / attention.log().mean().exp()) ** (exponent / 2)
    evened = gradients / relative[:, None]
    mean = states.mean(dim=2)
    transforms = [
        [_transform(states[side, head] - mean[side, head], evened[side, head]) for head in range(states.shape[1])]
        for side in range(SIDES)
    ]
    analysis = torch.stack([torch.stack([one[0] for one in heads]) for heads in transforms])
    std = torch.stack([torch.stack([one[1] for one in heads]) for heads in transforms])
    return mean.float(), analysis.float(), std.float(), torch.tensor(exponent, dtype=torch.float32)


def _attention_exponent(gradients: torch.Tensor, attention: torch.Tensor) -> float:
    """Return the power of attention by which squared gradients grow: the slope of bin means on a log scale."""
    energy = gradients.square().sum(dim=(0, 1, 3)).clamp_min(1e-30).log2().numpy()
    logarithm = attention.log2().numpy()
    order = np.argsort(logarithm)
    bins = np.array_split(order, min(20, len(order)))
    # Means and not medians: a few tokens carry most of the energy, and those are the ones to protect.
    x = np.array([logarithm[chosen].mean() for chosen in bins])
    y = np.array([np.log2(np.exp2(energy[chosen]).mean()) for chosen in bins])
    slope = float(np.polyfit(x, y, 1)[0])
    return min(max(slope, 0.0), 2.0)


def _transform(states: torch.Tensor, gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the transform of one head's keys or values.

    Args:
        states: float64 `[n, d]`, centred.
        gradients: float64 `[n, d]`.

    Returns:
        Analysis `[d, d]`, whose columns turn states into coefficients, and their standard deviations `[d]`, both
        float64, from the largest to the smallest.
    """
    identity = torch.eye(states.shape[1], dtype=torch.float64)
    fisher = gradients.T @ gradients / len(gradients)
    fisher = (1 - SHRINKAGE) * fisher + SHRINKAGE * fisher.diagonal().mean().clamp_min(1e-20) * identity
    eigenvalues, eigenvectors = torch.linalg.eigh(fisher)
    metric = eigenvectors @ torch.diag(eigenvalues.sqrt()) @ eigenvectors.T
    covariance = states.T @ states / len(states)
    _, directions = torch.linalg.eigh(metric @ covariance @ metric)
    analysis = metric @ directions.flip(1)
    std = (states @ analysis).square().mean(dim=0).sqrt()
    return analysis, std.clamp_min(std.max() * 1e-6).clamp_min(1e-20)
