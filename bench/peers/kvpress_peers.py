"""Run NVIDIA's kvpress on the windows of `spectrumkv-bench quality`, and write the same rows: `make bench-peers`.

kvpress pins an older transformers than SpectrumKV needs, so this program runs in an environment of its own. It shares
windows, scores and rows with the bench, and imports nothing that depends on transformers' version.

A press selects tokens for each KV head after a prompt has run, by its own code. The selected states are rounded to 16
bits, like the reference, and tokens keep their positions. Each kept element counts 16 bits; neither the selection nor
framing is counted, which favours the presses.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import BasePress, ExpectedAttentionPress, KnormPress, SnapKVPress, StreamingLLMPress
from rich.console import Console
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from spectrumkv.bench.flags import DEFAULT_BUDGETS, add_output_flags, parse_budgets
from spectrumkv.bench.quality.quality_command import add_text_flags, quality_table
from spectrumkv.bench.quality.scoring import WindowScore, quality_row
from spectrumkv.bench.quality.texts import Window, cut, load_text, text_digest
from spectrumkv.bench.report import plot
from spectrumkv.bench.report.console import progress, results_console
from spectrumkv.bench.report.results import check_destinations, write_result
from spectrumkv.client.cli.output import STDOUT
from spectrumkv.common.errors import FailedPreconditionError, SpectrumKVError
from spectrumkv.common.model.files.directory import find_model, tokenizer_class
from spectrumkv.common.model.spec import weights_digest
from spectrumkv.common.model.support import layer_attention
from spectrumkv.prefill_server.tuning.divergence import compare

# Keys and values of one layer, `[1, kv_heads, k, head_dim]` each, keys after RoPE.
LayerKv = tuple[torch.Tensor, torch.Tensor]

# Each press runs with its default settings.
PRESSES = {
    "kvpress-snapkv": SnapKVPress,
    "kvpress-expected-attention": ExpectedAttentionPress,
    "kvpress-streaming-llm": StreamingLLMPress,
    "kvpress-knorm": KnormPress,
}


@dataclass(frozen=True)
class PressMethod:
    """Name a press at one budget, as `quality_row` needs it."""

    policy: str
    budget: float
    press: BasePress
    codec: str = "fp16"
    scorer: str = ""
    scope: str = ""


@torch.inference_mode()
def score_window(model: PreTrainedModel, window: Window, methods: Sequence[PressMethod]) -> list[WindowScore]:
    """Prefill a window's context once, and score every press on it.

    Args:
        model: the model.
        window: the window.
        methods: the presses.

    Returns:
        A score for each press.
    """
    exact: list[LayerKv] = []
    pressed: list[list[LayerKv]] = [[] for _ in methods]
    with presses_applied(model, methods, exact, pressed):
        model(input_ids=torch.tensor([window.context], device=model.device), past_key_values=DynamicCache())
    reference = _read(model, exact, window)
    fp16 = _bytes(exact)
    scores = []
    for kept in pressed:
        distance = compare(_read(model, kept, window), reference, window.targets)
        counted = _bytes(kept)
        scores.append(WindowScore.of(distance, len(window.targets), counted, fp16, budget_nominal=counted / fp16))
    return scores


@contextmanager
def presses_applied(
    model: PreTrainedModel, methods: Sequence[PressMethod], exact: list[LayerKv], pressed: list[list[LayerKv]]
) -> Iterator[None]:
    """Apply every press to every layer of the prompt that runs in the block, without changing the prompt's own cache.

    Args:
        model: the model that runs the prompt.
        methods: the presses.
        exact: receives each layer's KV.
        pressed: receives, for each press, what it keeps of each layer.
    """

    def hook(module: torch.nn.Module, arguments: Any, options: dict[str, Any], output: Any) -> None:
        layer = options["past_key_values"].layers[module.layer_idx]
        exact.append((layer.keys, layer.values))
        for method, kept in zip(methods, pressed, strict=True):
            kept.append(
                method.press.compress(module, options["hidden_states"], layer.keys, layer.values, output[1], options)
            )

    with ExitStack() as hooks:
        for method in methods:
            method.press.post_init_from_model(model)
        for layer in model.model.layers:
            # kvpress sets this too, for presses that rotate queries.
            layer.self_attn.rotary_emb = model.model.rotary_emb
            hooks.callback(layer.self_attn.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _read(model: PreTrainedModel, kv: Sequence[LayerKv], window: Window) -> torch.Tensor:
    """Return the logits `[m, vocab]` of the tokens that follow the context, over this KV rounded to 16 bits."""
    cache = DynamicCache()
    half = torch.float16 if model.dtype == torch.float32 else model.dtype
    for layer, (keys, values) in enumerate(kv):
        cache.update(keys.to(half).to(model.dtype), values.to(half).to(model.dtype), layer)
    start = len(window.context)
    positions = torch.arange(start, start + len(window.following), device=model.device)
    ids = torch.tensor([window.following], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, position_ids=positions[None], past_key_values=cache).logits[0]
    return logits


def _bytes(kv: Sequence[LayerKv]) -> int:
    return sum(2 * (keys.numel() + values.numel()) for keys, values in kv)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show and write.

    Args:
        arguments: of the command line; None is the process's own.

    Returns:
        The exit status: 0, or 1 after an error that standard error names.
    """
    parser = argparse.ArgumentParser(prog="python -m spectrumkv.bench.peers.kvpress_peers", description=__doc__)
    add_text_flags(parser)
    parser.add_argument("--budgets", type=parse_budgets, default=DEFAULT_BUDGETS, metavar="NUMBERS")
    parser.add_argument("--model", metavar="NAME", help="local directory or hub name (default: the embedded model)")
    add_output_flags(parser, "draw KL and Δ perplexity against counted bytes")
    try:
        _run(parser.parse_args(arguments))
    except SpectrumKVError as error:
        Console(stderr=True, soft_wrap=True).print(f"{error.code}: {error.message}", markup=False)
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    check_destinations(arguments)
    text = load_text(arguments.text)
    arguments.text_sha256 = text_digest(text)
    name, directory = find_model(arguments.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32 if device == "cpu" else "auto", attn_implementation="sdpa"
    )
    model = model.eval().to(device)
    if any(layer.sliding_window or layer.softcap for layer in layer_attention(model.config)):
        raise FailedPreconditionError(f"{name} has sliding windows or capped logits, which kvpress does not support")
    windows = cut(
        tokenizer_class(directory).from_pretrained(directory), text,
        arguments.context, arguments.scored, arguments.skip_windows, arguments.windows,
    )  # fmt: skip
    methods = [
        PressMethod(policy, budget, press(compression_ratio=1 - budget))
        for policy, press in PRESSES.items()
        for budget in arguments.budgets
    ]
    scores: list[list[WindowScore]] = [[] for _ in methods]
    with progress(len(windows), Console(stderr=True)) as on_step:
        for window in windows:
            for mine, score in zip(scores, score_window(model, window, methods), strict=True):
                mine.append(score)
            on_step(f"window {window.index}")
    rows = [quality_row(method, mine) for method, mine in zip(methods, scores, strict=True)]
    if arguments.json != STDOUT:
        results_console().print(quality_table(rows, intervals=True))
    if arguments.json is not None:
        described = {
            "name": name,
            "architecture": model.config.model_type,
            "weights_digest": weights_digest(directory),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": device,
        }
        write_result(arguments.json, arguments, rows, described)
    if arguments.plot is not None:
        plot.draw_quality(rows, arguments.plot, name)


if __name__ == "__main__":
    sys.exit(main())
