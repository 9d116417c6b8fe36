"""What a logits processor is, and the registry of them.

A processor is made for one answer. It takes the scores of all tokens as the processors before it left them, and the
answer so far, and returns new scores; a token with a score of minus infinity is not chosen.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from enum import Enum, auto

import torch

from spectrumkv.common.generation.params import SamplingParams
from spectrumkv.common.generation.vocabulary import Vocabulary
from spectrumkv.common.registry import Registry


class History:
    """What the next token follows.

    Args:
        prompt_token_ids: the prompt.

    Attributes:
        prompt: the ids in the prompt, each once.
        generated: the answer so far.
        counts: how often each id was generated.
    """

    def __init__(self, prompt_token_ids: Iterable[int]) -> None:
        self.prompt = frozenset(prompt_token_ids)
        self.generated: list[int] = []
        self.counts: Counter[int] = Counter()

    def append(self, token_id: int) -> None:
        """Take the next token of the answer."""
        self.generated.append(token_id)
        self.counts[token_id] += 1


class Stage(Enum):
    """When a processor has its turn; within a stage, in the order of registration."""

    # Rules tokens out, or prefers some, whatever came before.
    EXCLUDE = auto()
    # Weighs tokens by how often they came before.
    PENALIZE = auto()
    # Narrows a random draw; greedy choices leave it out, since the likeliest token always stays.
    NARROW = auto()


# Scores are float64 `[vocab]` on the CPU, and are not written to: they may be the model's own.
Processor = Callable[[torch.Tensor, History], torch.Tensor]
# Returns None where the parameters do not ask for the processor.
Factory = Callable[[SamplingParams, Vocabulary | None], Processor | None]

processors: Registry[tuple[Stage, Factory]] = Registry("logits processor")


def processor(name: str, stage: Stage) -> Callable[[Factory], Factory]:
    """Return a decorator that registers a factory of processors.

    Args:
        name: of the processor, for errors.
        stage: when it has its turn.

    Returns:
        The decorator; what it decorates stays as it is.
    """

    def add(factory: Factory) -> Factory:
        processors.register(name)((stage, factory))
        return factory

    return add


def make_processors(params: SamplingParams, vocabulary: Vocabulary | None) -> list[Processor]:
    """Return the processors that an answer's parameters ask for, in the order of their turns.

    Args:
        params: of one answer.
        vocabulary: the model's; None where no processor that needs it is asked for.

    Returns:
        The processors.
    """
    stages = [stage for stage in Stage if params.temperature > 0 or stage is not Stage.NARROW]
    factories = (factory for stage in stages for at, factory in map(processors.get, processors) if at is stage)
    made = (factory(params, vocabulary) for factory in factories)
    return [one for one in made if one is not None]
