"""Reads GGUF files: their fields, and their tensors under the names that transformers gives to a model's parameters.

transformers itself can read GGUF, but then it needs `accelerate`, its dequantization differs between releases (and
hosts whose weights differ in one bit refuse each other), and tokenizers come out otherwise than the file says.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from gguf.quants import dequantize
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, PretrainedConfig

from spectrumkv.common.errors import FailedPreconditionError

Weights = np.ndarray[Any, np.dtype[np.float32]]


class GgufFile:
    """Reads one file.

    Args:
        path: the file.
        architecture: that the file must have.

    Attributes:
        fields: metadata by name, as Python values.

    Raises:
        FailedPreconditionError: the file has another architecture.
    """

    def __init__(self, path: Path, architecture: MODEL_ARCH) -> None:
        self._reader = GGUFReader(path)
        self._architecture = architecture
        self.fields: dict[str, Any] = {name: field.contents() for name, field in self._reader.fields.items()}
        self.require("general.architecture", MODEL_ARCH_NAMES[architecture])

    def require(self, name: str, expected: object) -> None:
        """Check that a field has a value.

        Args:
            name: of the field.
            expected: its value.

        Raises:
            FailedPreconditionError: it has another one, or none.
        """
        if self.fields.get(name) != expected:
            raise FailedPreconditionError(
                f"the GGUF file's {name} is {self.fields.get(name)!r}; only {expected!r} can be converted"
            )

    def weights(
        self, config: PretrainedConfig, adjusted: Callable[[str, Weights], Weights]
    ) -> dict[str, torch.Tensor]:
        """Dequantize the tensors.

        Weights become float32: a block-quantized weight is scale × code + offset with float16 scale and offset, which
        no 16-bit dtype holds exactly.

        Args:
            config: of the model that the file has.
            adjusted: turns a tensor, given its parameter's name, from llama.cpp's convention to transformers'.

        Returns:
            float32 on the CPU, by name of the parameter.

        Raises:
            FailedPreconditionError: the file's tensors are not those of the model.
        """
        with torch.device("meta"):
            parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
        names = get_tensor_name_map(self._architecture, config.num_hidden_layers)
        stored = {names.get_name(name, (".weight",)): name for name in parameters}
        tensors = {stored.get(tensor.name, tensor.name): tensor for tensor in self._reader.tensors}
        if tensors.keys() != parameters.keys():
            odd = sorted(tensors.keys() ^ parameters.keys())
            raise FailedPreconditionError(
                f"{len(odd)} of the GGUF file's tensors are missing or unknown: {', '.join(odd[:3])}"
                f"{', …' if len(odd) > 3 else ''}"
            )
        shown = track(
            tensors.items(),
            "Dequantizing weights",
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        # Weights stored as float32 are still read-only views of the file.
        return {
            name: torch.from_numpy(
                np.array(adjusted(name, dequantize(one.data, one.tensor_type)), np.float32, order="C")
            )
            for name, one in shown
        }
