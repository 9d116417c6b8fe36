"""Where the KV of one prompt goes in a consuming worker: a layer at a time into staging memory, then into pages."""

import torch

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.kv.geometry import HeadRange, KvGeometry
from spectrumkv.vllm_plugin.layers import EngineLayer


class PageSlots:
    """Takes the KV heads of this rank out of the streams that hold them, and writes whole layers into pages.

    Streams of a producer with other ranks hold other heads: `stream` says which ones the next segments are of. A
    layer is written once all of its tokens have all of this rank's heads.

    Args:
        layers: of the model, in order.
        geometry: of this rank's heads.
        heads: of this rank.
        slots: int64 `[tokens]`, the slot of each token of the prompt.
        skip: tokens at the beginning that are in their pages already.
    """

    def __init__(
        self, layers: list[EngineLayer], geometry: KvGeometry, heads: HeadRange, slots: torch.Tensor, skip: int
    ) -> None:
        self._layers, self._geometry, self._heads = layers, geometry, heads
        self._device = layers[0].pages.device
        self._slots, self._skip = slots.to(self._device), skip
        self._staged: dict[int, torch.Tensor] = {}
        self._from_stream: dict[int, torch.Tensor] = {}
        self._missing = [len(slots) * heads.count] * geometry.layers
        self._stream = heads

    def stream(self, heads: HeadRange) -> None:
        """Say which KV heads the segments have that come from now on.

        Args:
            heads: of the stream.

        Raises:
            FailedPreconditionError: this rank needs none of them.
        """
        if heads.overlap(self._heads) is None:
            raise FailedPreconditionError(
                f"a stream holds KV heads {heads.first} to {heads.end - 1}, and this rank needs {self._heads.first} "
                f"to {self._heads.end - 1}"
            )
        self._stream, self._from_stream = heads, {}

    def keys(self, layer: int, first: int, end: int) -> torch.Tensor:
        """Return where keys go; see `KvSlots.keys`."""
        return self._staging(layer)[0, :, first:end]

    def values(self, layer: int, first: int, end: int) -> torch.Tensor:
        """Return where values go; see `KvSlots.values`."""
        return self._staging(layer)[1, :, first:end]

    def drop(self, layer: int, tokens: torch.Tensor) -> None:
        """Refuse a prompt with dropped tokens.

        Raises:
            FailedPreconditionError: always; vLLM would attend to the tokens.
        """
        raise FailedPreconditionError(
            f"{len(tokens)} tokens of layer {layer} were not sent, and vLLM cannot mask tokens; ask for a "
            "policy and a budget that drop none"
        )

    def written(self, layer: int, tokens: int) -> None:
        """Take in that some tokens of a layer are decoded, and write the layer where it is complete.

        Args:
            layer: from 0.
            tokens: how many.
        """
        shared = self._stream.overlap(self._heads)
        assert shared is not None
        self._missing[layer] -= tokens * shared.count
        if self._missing[layer] == 0:
            self._collect(layer)
            self._write(layer)

    def end_stream(self) -> None:
        """Keep what the stream brought of layers for which another stream brings the other heads."""
        for layer in list(self._from_stream):
            self._collect(layer)

    def _staging(self, layer: int) -> torch.Tensor:
        """Return memory for one layer of the stream, `[2, kv_heads, tokens, head_dim]`."""
        where = self._staged if self._stream == self._heads else self._from_stream
        if layer not in where:
            where[layer] = self._empty(self._stream.count)
        return where[layer]

    def _empty(self, kv_heads: int) -> torch.Tensor:
        shape = (2, kv_heads, len(self._slots), self._geometry.head_dim)
        return torch.empty(shape, dtype=self._geometry.native_dtype, device=self._device)

    def _collect(self, layer: int) -> None:
        """Move this rank's heads from the stream's memory into its own."""
        brought = self._from_stream.pop(layer, None)
        shared = self._stream.overlap(self._heads)
        if brought is None or shared is None:
            return
        if layer not in self._staged:
            self._staged[layer] = self._empty(self._heads.count)
        mine = slice(shared.first - self._heads.first, shared.end - self._heads.first)
        theirs = slice(shared.first - self._stream.first, shared.end - self._stream.first)
        self._staged[layer][:, mine] = brought[:, theirs]

    def _write(self, layer: int) -> None:
        states = self._staged.pop(layer)[:, :, self._skip :].transpose(1, 2).contiguous()
        into = self._layers[layer]
        into.write(states[0], states[1], into.pages, self._slots[self._skip :])
