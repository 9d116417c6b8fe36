"""Makes a vLLM server generate given tokens, so that its log-probabilities are those of a given text.

`vllm … --logits-processors spectrumkv.bench.vllm.forced_tokens:ForcedTokens` loads it. A request names its tokens in
`"vllm_xargs": {"forced_tokens": […]}`; others are served as always. vLLM reports log-probabilities from before
processors (`--logprobs-mode raw_logprobs`, its default), so that they are the model's own.
"""

from typing import TYPE_CHECKING

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from vllm.sampling_params import SamplingParams

ARGUMENT = "forced_tokens"


# vLLM is not installed where types are checked.
class ForcedTokens(AdapterLogitsProcessor):  # type: ignore[misc]
    """Leaves one token to sample from where a request says which."""

    def is_argmax_invariant(self) -> bool:
        """Return False: another token than the most likely one may be forced."""
        return False

    def new_req_logits_processor(
        self, params: "SamplingParams"
    ) -> "Callable[[list[int], torch.Tensor], torch.Tensor] | None":
        """Return what forces the tokens of a request.

        Args:
            params: of the request.

        Returns:
            A function of the tokens so far and the next one's logits `[vocab]`; None where nothing is forced.
        """
        forced = (params.extra_args or {}).get(ARGUMENT)
        if not forced:
            return None

        def force(generated: list[int], logits: "torch.Tensor") -> "torch.Tensor":
            wanted = forced[len(generated)]
            value = logits[wanted].clone()
            logits.fill_(float("-inf"))
            logits[wanted] = value
            return logits

        return force
