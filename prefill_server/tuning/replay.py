"""Generates over a prompt's KV as decode would receive it, without a network or a second process."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.prefill_server.transfer.plan import KvPlan


class LayerKv(NamedTuple):
    """Holds keys and values of one layer: `[kv_heads, n, head_dim]` each in the model's dtype, keys after RoPE."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, eq=False)
class CapturedPrompt:
    """Holds a prompt that the model has run.

    Attributes:
        layers: each layer's capture, from the first to the last.
        first_token: the likeliest token after the prompt.
    """

    layers: tuple[LayerCapture, ...]
    first_token: int

    def exact_kv(self) -> list[LayerKv]:
        """Return the cache as the model made it."""
        return [LayerKv(layer.keys, layer.values) for layer in self.layers]

    def segments(self, plan: KvPlan, geometry: KvGeometry) -> Iterator[KvSegment]:
        """Code the cache.

        Args:
            plan: how the KV is scored, tiered and coded.
            geometry: shape and dtype of the model's cache.

        Yields:
            The segments of the first layer, then those of the next.
        """
        encoder = plan.encoder(geometry, self.layers[0].tokens, framing_bytes=0)
        for layer in self.layers:
            yield from encoder.encode(layer)

    @torch.inference_mode()
    def received_kv(self, plan: KvPlan, geometry: KvGeometry) -> list[LayerKv]:
        """Code the cache and decode it again.

        Args:
            plan: with a policy that drops no token, since dropped tokens are not masked here.
            geometry: shape and dtype of the model's cache.

        Returns:
            The cache as a decode worker would hold it, an entry per layer.
        """
        received = [LayerKv(torch.empty_like(layer.keys), torch.empty_like(layer.values)) for layer in self.layers]
        decoder = plan.decoder(geometry)
        for segment in self.segments(plan, geometry):
            span = slice(segment.first_token, segment.first_token + segment.tiers.numel())
            into = received[segment.layer]
            decoder.decode(segment, into.keys[:, span], into.values[:, span])
        return received


@torch.inference_mode()
def capture_prompt(model: PreTrainedModel, token_ids: Sequence[int], window: int) -> CapturedPrompt:
    """Run a prompt and keep its layers' captures.

    Args:
        model: with the hooked attention; see `PrefillEngine`.
        token_ids: the prompt.
        window: how many of the last queries of each layer to keep.

    Returns:
        The captures and the likeliest next token.
    """
    layers: list[LayerCapture] = []
    ids = torch.tensor([list(token_ids)], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=1, kv_hooks=[layers.append], window=window).logits
    return CapturedPrompt(tuple(layers), int(logits[0, -1].argmax()))


@torch.inference_mode()
def logits_over(model: PreTrainedModel, kv: Sequence[LayerKv], token_ids: Sequence[int]) -> torch.Tensor:
    """Predict the next token after each of some tokens that follow a prompt, in one pass.

    Args:
        model: with the hooked attention.
        kv: the prompt's cache, one entry per layer.
        token_ids: m tokens that follow the prompt.

    Returns:
        Logits `[m, vocab]` in the model's dtype and on its device.
    """
    ids = torch.tensor([list(token_ids)], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, past_key_values=_cache(model, kv), use_cache=True).logits[0]
    return logits


@torch.inference_mode()
def generate_over(
    model: PreTrainedModel,
    kv: Sequence[LayerKv],
    first_token: int,
    max_tokens: int,
    eos_token_ids: Collection[int],
    draft: Sequence[int] = (),
) -> list[int]:
    """Generate greedily.

    Args:
        model: with the hooked attention.
        kv: the prompt's cache, one entry per layer.
        first_token: the token after the prompt, from exact KV, as it is when serving.
        max_tokens: most tokens, the first one included.
        eos_token_ids: any of these ends the generation.
        draft: a guess at the result, with the first token, such as the answer over other KV of the same prompt.
            One pass confirms all of its right tokens, in place of one pass for each (speculative decoding, arXiv
            2211.17192, section 2, for greedy choices and a draft that is given).

    Returns:
        The generated tokens, with the first one and with the one that ended the generation.
    """
    tokens = [first_token] if len(draft) < 2 else _confirmed(model, kv, draft)
    cache, seen = _cache(model, kv), 0
    while len(tokens) < max_tokens and tokens[-1] not in eos_token_ids:
        ids = torch.tensor([tokens[seen:]], device=model.device)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        seen = len(tokens)
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


def _confirmed(model: PreTrainedModel, kv: Sequence[LayerKv], draft: Sequence[int]) -> list[int]:
    """Return the draft up to its first wrong token, and the right token in place of that."""
    predicted: list[int] = logits_over(model, kv, draft[:-1]).argmax(dim=-1).tolist()
    pairs = enumerate(zip(predicted, draft[1:], strict=True))
    wrong = next((index for index, (ours, drafted) in pairs if ours != drafted), None)
    return list(draft) if wrong is None else [*draft[: wrong + 1], predicted[wrong]]


def _cache(model: PreTrainedModel, kv: Sequence[LayerKv]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(kv):
        cache.update(keys[None], values[None], layer)
    return cache
