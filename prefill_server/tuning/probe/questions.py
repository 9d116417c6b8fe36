"""The questions that the probe puts to the model: needles in prompts, and prose to predict. Each prompt runs once."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import torch

from spectrumkv.common.errors import ContextTooShortError, InvalidArgumentError
from spectrumkv.common.generation.beginning import beginning_token, begun
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.service.config import SCORE_WINDOW
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.tuning.divergence import Distance, compare
from spectrumkv.prefill_server.tuning.needle.prompt import NeedlePrompt, needle_prompt
from spectrumkv.prefill_server.tuning.replay import (
    CapturedPrompt,
    LayerKv,
    capture_prompt,
    generate_over,
    logits_over,
)

# One needle per depth, each with a fact of its own.
DEPTHS = (0.1, 0.5, 0.9)
PROMPT_TOKENS = 1024
ANSWER_TOKENS = 16
# Texts that calibration does not read (it reads the haystack): a story in dialogue, a manual with a table and code.
PROSE = ("ferry.txt", "pump.txt")
CONTEXT_TOKENS, SCORED_TOKENS = 768, 256


def needle_prompts(loaded: LoadedModel) -> list[NeedlePrompt]:
    """Return the prompts that hide a needle, one for each depth.

    Raises:
        ContextTooShortError: the model's context is too short.
    """
    room = min(PROMPT_TOKENS, loaded.context_length - ANSWER_TOKENS)
    try:
        return [needle_prompt(loaded.tokenizer, room, depth, needle) for needle, depth in enumerate(DEPTHS)]
    except InvalidArgumentError as error:
        raise ContextTooShortError(
            f"the probe needs a longer context than the {loaded.context_length} tokens of {loaded.name} "
            f"({error.message}); start with --int4 on or --int4 off"
        ) from error


@dataclass(frozen=True)
class Stretch:
    """Holds a piece of prose.

    Attributes:
        context: tokens whose KV is coded.
        scored: the tokens after these, which the model predicts.
    """

    context: tuple[int, ...]
    scored: tuple[int, ...]


def prose_stretches(loaded: LoadedModel) -> list[Stretch]:
    """Return the beginnings of the probe's texts, as long as the model's context allows."""
    whole = CONTEXT_TOKENS + SCORED_TOKENS
    stretches = []
    for name in PROSE:
        text = (files("spectrumkv.prefill_server.tuning.probe") / "prose" / name).read_text(encoding="utf-8")
        ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids = begun(ids[: min(whole, loaded.context_length)], beginning_token(loaded.tokenizer))
        cut = len(ids) * CONTEXT_TOKENS // whole
        stretches.append(Stretch(tuple(ids[:cut]), tuple(ids[cut:])))
    return stretches


@dataclass(frozen=True, eq=False)
class NeedleQuestion:
    """Holds a prompt that the model has run, and the model's answer over the exact KV.

    Attributes:
        loaded: the model.
        prompt: with the needle.
        captured: the prompt's KV and first token.
        exact_answer: the answer's tokens.
    """

    loaded: LoadedModel
    prompt: NeedlePrompt
    captured: CapturedPrompt
    exact_answer: tuple[int, ...]

    @classmethod
    def put(cls, loaded: LoadedModel, prompt: NeedlePrompt) -> "NeedleQuestion":
        """Run the prompt.

        Returns:
            The question, with the answer over the exact KV.
        """
        captured = capture_prompt(loaded.model, prompt.token_ids, SCORE_WINDOW)
        answer = generate_over(
            loaded.model, captured.exact_kv(), captured.first_token, ANSWER_TOKENS, loaded.eos_token_ids
        )
        return cls(loaded, prompt, captured, tuple(answer))

    @property
    def found_fp16(self) -> bool:
        """Whether the model finds the needle over the exact KV."""
        return self.prompt.is_answered_by(self._text(self.exact_answer))

    def answer_under(self, plan: KvPlan) -> str:
        """Return the answer over KV that was coded and decoded."""
        kv = self.captured.received_kv(plan, self.loaded.geometry)
        tokens = generate_over(
            self.loaded.model,
            kv,
            self.captured.first_token,
            ANSWER_TOKENS,
            self.loaded.eos_token_ids,
            draft=self.exact_answer,
        )
        return self._text(tokens)

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self.loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()


@dataclass(frozen=True, eq=False)
class ProseQuestion:
    """Holds a stretch of prose whose context the model has run, and its predictions over the exact KV.

    Attributes:
        loaded: the model.
        stretch: the prose.
        captured: the context's KV.
        exact_logits: `[m, vocab]` in the model's dtype, after each scored token but the last.
    """

    loaded: LoadedModel
    stretch: Stretch
    captured: CapturedPrompt
    exact_logits: torch.Tensor

    @classmethod
    def put(cls, loaded: LoadedModel, stretch: Stretch) -> "ProseQuestion":
        """Run the context.

        Returns:
            The question, with the predictions over the exact KV.
        """
        captured = capture_prompt(loaded.model, stretch.context, SCORE_WINDOW)
        return cls(loaded, stretch, captured, logits_over(loaded.model, captured.exact_kv(), stretch.scored[:-1]))

    def received_kv(self, plan: KvPlan) -> list[LayerKv]:
        """Return the context's KV after coding and decoding, `[kv_heads, n, head_dim]` tensors for each layer."""
        return self.captured.received_kv(plan, self.loaded.geometry)

    def distance(self, kv: Sequence[LayerKv]) -> Distance:
        """Compare the predictions over some KV with those over the exact KV.

        Args:
            kv: the context's, for each layer `[kv_heads, n, head_dim]` keys and values.

        Returns:
            The distance, summed over `predictions` tokens.
        """
        logits = logits_over(self.loaded.model, kv, self.stretch.scored[:-1])
        return compare(logits, self.exact_logits, self.stretch.scored[1:])

    def distance_under(self, plan: KvPlan) -> Distance:
        """Return the distance of the predictions over KV that was coded and decoded."""
        return self.distance(self.received_kv(plan))

    @property
    def predictions(self) -> int:
        """How many tokens a distance is summed over."""
        return len(self.stretch.scored) - 1
