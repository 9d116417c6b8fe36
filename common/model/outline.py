"""Says what a model is by its configuration and its files' headers: nothing is fetched, and no weight is read."""

from dataclasses import dataclass

import torch

from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.model.description import cache_geometry, read_tokenizer
from spectrumkv.common.model.files.configuration import read_config
from spectrumkv.common.model.files.directory import find_present_model
from spectrumkv.common.model.files.footprint import weights_bytes
from spectrumkv.common.model.load import choose_device, choose_dtype, own_dtype


@dataclass(frozen=True)
class ModelOutline:
    """What is known of a model before it is loaded.

    Attributes:
        name: what clients call the model.
        architecture: its type, such as "llama".
        device: where it will run.
        geometry: the shape of its KV cache, with the dtype that it computes in.
        context_length: longest prompt plus completion in tokens.
        weight_bytes: what its weights will take on the device.
    """

    name: str
    architecture: str
    device: torch.device
    geometry: KvGeometry
    context_length: int
    weight_bytes: int


def outline_model(name: str | None, device: str, dtype: str) -> ModelOutline | None:
    """Check what can be checked of a model without loading it.

    Args:
        name: a local directory, a hub name, or None for the embedded default.
        device: "cpu", "cuda" or "auto".
        dtype: "float32", "float16", "bfloat16" or "auto".

    Returns:
        What the model is; None where it would have to be fetched first.

    Raises:
        FailedPreconditionError: the model is not found, is damaged or cannot be served, or there is no such device.
    """
    place = choose_device(device)
    found = find_present_model(name)
    if found is None:
        return None
    public_name, directory = found
    config = read_config(directory)
    read_tokenizer(directory, config)
    computed_in = choose_dtype(dtype, place) or own_dtype(config)
    return ModelOutline(
        name=public_name,
        architecture=config.model_type,
        device=place,
        geometry=cache_geometry(config, computed_in),
        context_length=config.max_position_embeddings,
        weight_bytes=weights_bytes(directory, computed_in),
    )
