"""Finds out whether it is the model that is broken, once the logits of a request were no numbers."""

import torch

from spectrumkv.common.errors import ResourceExhaustedError, SpectrumKVError
from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.sampling import Sampler
from spectrumkv.common.generation.text import TextStream
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.decode_server.kv_pool import Allocation, KvPool
from spectrumkv.decode_server.model_runner import DecodeRow, ModelRunner
from spectrumkv.decode_server.request import DecodeAnswer

# Plain enough that a model which computes no numbers for it computes none for anybody.
TEXT = "Once"


class ModelCheck:
    """Computes a token of the service's own, which has no KV before it.

    Logits of a request prove nothing about the model: a caller who sends KV may have made them so, and must not be
    able to end the service.

    Args:
        loaded: the model.
        pool: has the slots that the token needs.
        runner: runs the model.
    """

    def __init__(self, loaded: LoadedModel, pool: KvPool, runner: ModelRunner) -> None:
        self._loaded = loaded
        self._pool = pool
        self._runner = runner
        self._token: int = loaded.tokenizer(TEXT, add_special_tokens=False, verbose=False).input_ids[0]

    def failure(self) -> str | None:
        """Return what is wrong with the model; None where nothing is, or no slot is free to find out.

        To be called between steps, in inference mode.
        """
        try:
            with self._pool.reserve(2) as allocation:
                logits = self._runner.logits([DecodeRow(self._answer(allocation), self._token, 0)])
        except ResourceExhaustedError:
            return None
        except Exception as error:  # noqa: BLE001  # whatever a step raises
            reason = error.message if isinstance(error, SpectrumKVError) else f"{type(error).__name__}: {error}"
            return f"the model fails on a request and on a token of the service's own: {reason}"
        if bool(torch.isfinite(logits).all()):
            return None
        return "the model computes infinities or NaN for a request and for a token of the service's own"

    def _answer(self, allocation: Allocation) -> DecodeAnswer:
        params, prompt = SamplingParams(max_tokens=1, seed=0), (self._token,)
        return DecodeAnswer(
            prompt_token_ids=prompt,
            allocation=allocation,
            sampler=Sampler(params, prompt),
            text=TextStream(self._loaded.tokenizer, params, self._loaded.eos_token_ids, prompt),
        )
