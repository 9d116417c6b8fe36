"""Make the dialogues of `--text dialogue`: the default model answers the project's questions, the cache keeps them.

Dialogues are plain text with a name before each turn, so that every model reads the same text. The answers are
sampled at a fixed seed. Another processor may sample other answers; `meta.args.text_sha256` tells them apart.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spectrumkv.common.model.cache import build_once, cache_directory
from spectrumkv.common.model.load import LoadedModel, load_model

# Increase this when a change makes other dialogues than before.
BUILD = 1
FILE = "dialogues.txt"
SEED = 0
TEMPERATURE, TOP_P = 0.8, 0.95
ANSWER_TOKENS = 192
OPENINGS = (
    "How do I keep a sourdough starter alive when I travel for two weeks?",
    "My neighbour's dog barks all night. What can I do without starting a quarrel?",
    "Explain to me why the sky is blue in the morning and red in the evening.",
    "I have an interview for a job as a nurse on Monday. What will they ask me?",
    "What is the difference between a virus and a bacterium?",
    "Help me plan a weekend in a small town by the sea with two children.",
    "Why does my bicycle chain keep jumping when I climb a hill?",
    "Write a short letter to my landlord about the broken heating.",
    "How does a ship made of steel stay on top of the water?",
    "I want to read more books this year but I never find the time.",
    "What should I know before I adopt an old cat?",
    "Can you teach me how to calculate compound interest?",
    "My soup is far too salty and the guests come in ten minutes!",
    "Tell me a story about a lighthouse keeper who is afraid of the dark.",
    "How do vaccines work, and why do some need a second dose?",
    "Which vegetables can I grow on a balcony that gets little sun?",
    "I feel tired every afternoon at three o'clock. What might be the reason?",
    "What happened to the dinosaurs, and how do we know?",
    "How can I learn to play the piano as an adult?",
    "Please explain the rules of chess to somebody who is eight years old.",
    "What is inflation, and who decides how high it is?",
    "My computer has become very slow. Where do I start looking?",
    "Describe a good way to prepare for running ten kilometres.",
    "Why do leaves change their colour in autumn?",
)
FOLLOW_UPS = (
    "Thank you. Can you give me an example of that?",
    "I did not quite understand the last part. Could you say it in other words?",
    "And what would you do if that does not work?",
    "Which of these matters most, and why?",
    "How long does that usually take?",
    "Can you sum that up in two sentences?",
)
TURNS = 4


@dataclass(frozen=True)
class Turn:
    """Hold what one of the two speakers said."""

    role: str
    content: str


def dialogues() -> str:
    """Return the dialogues; the first call makes them, which takes some minutes on a CPU.

    Raises:
        FailedPreconditionError: the default model cannot be loaded, or the cache cannot be written.
    """

    def build(directory: Path) -> None:
        logging.getLogger(__name__).info(
            "making %d dialogues with the default model, which takes some minutes", len(OPENINGS)
        )
        held = hold(load_model(), OPENINGS, TURNS, ANSWER_TOKENS)
        (directory / FILE).write_text("\n\n".join(map(transcript, held)), encoding="utf-8")

    def read(directory: Path) -> str:
        return (directory / FILE).read_text(encoding="utf-8")

    return build_once(cache_directory() / "texts" / f"dialogue-{BUILD}", "the dialogues", build, read)


def hold(loaded: LoadedModel, openings: Sequence[str], turns: int, answer_tokens: int) -> list[list[Turn]]:
    """Hold a dialogue for each opening, all of them at once.

    Args:
        loaded: the model that answers; its tokenizer has a chat template.
        openings: the first question of each dialogue.
        turns: questions in each dialogue.
        answer_tokens: largest number of tokens of an answer.

    Returns:
        The turns of each dialogue.
    """
    held = [[Turn("user", opening)] for opening in openings]
    for turn in range(turns):
        for dialogue, answer in zip(held, _answers(loaded, held, SEED + turn, answer_tokens), strict=True):
            dialogue.append(Turn("assistant", answer))
        if turn + 1 < turns:
            for number, dialogue in enumerate(held):
                dialogue.append(Turn("user", FOLLOW_UPS[(number + turn) % len(FOLLOW_UPS)]))
    return held


def transcript(dialogue: Sequence[Turn]) -> str:
    """Return a dialogue as plain text."""
    return "\n\n".join(f"{turn.role.title()}: {turn.content}" for turn in dialogue)


@torch.inference_mode()
def _answers(loaded: LoadedModel, held: Sequence[Sequence[Turn]], seed: int, answer_tokens: int) -> Iterator[str]:
    tokenizer = loaded.tokenizer
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in dialogue],
            add_generation_prompt=True,
            tokenize=False,
        )
        for dialogue in held
    ]
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt").to(
        loaded.device
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generated = loaded.model.generate(
            **batch, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0, max_new_tokens=answer_tokens
        )
    for tokens in generated[:, batch.input_ids.shape[1] :]:
        yield tokenizer.decode(tokens, skip_special_tokens=True).strip()
