"""What one process of plain transformers generates, and when two greedy outputs count as the same."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

# Rule 7 of the design: a step may differ only where the two top logits lie this close.
LOGIT_TIE = 1e-3


def reference_model(directory: Path, softcapped: bool = False) -> PreTrainedModel:
    """The model as transformers loads and runs it, untouched by us."""
    attention = "eager" if softcapped else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention)
    return model.eval()


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: Sequence[int], tokens: int) -> list[int]:
    """Greedy output of transformers' own `generate`, end-of-sequence tokens ignored."""
    output = model.generate(
        torch.tensor([list(prompt)]),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=0,
        eos_token_id=None,
    )
    return output[0, len(prompt) :].tolist()


@torch.inference_mode()
def worst_gap(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """By how much a generated token's logit lies below the best one, at the worst step."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(tokens)).logits[0].float()
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float((logits.max(dim=1).values - chosen).max())


def assert_same_greedy(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> None:
    """Fail unless `tokens` is the model's greedy output, ties aside.

    Each token must be the best one after those before it, which one pass over all of them tells.
    """
    gap = worst_gap(model, prompt, tokens)
    assert gap <= LOGIT_TIE, f"a token lies {gap} below the best one: {list(tokens)}"
