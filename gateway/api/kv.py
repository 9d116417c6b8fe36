"""Read how a prompt's KV is to be sent, and what is to be told of it: our own field `kv`."""

import reprlib
from typing import Annotated, Literal

from pydantic import BeforeValidator

from spectrumkv.client.kv_map import LAYERS, TOKENS
from spectrumkv.client.request import KvChoice
from spectrumkv.gateway.api.fields import SPECTRUMKV, FieldError, Number, RequestFields, Text, supported


def _read_map(value: object) -> object:
    """Return what map is asked for.

    Raises:
        FieldError: there is no such map.
    """
    if value is None or isinstance(value, bool) or value == LAYERS:
        return value
    raise FieldError(f'map is {reprlib.repr(value)}; allowed: true, false and "layers"')


class KvFields(RequestFields):
    """Say how the prompt's KV is sent from prefill to decode."""

    budget: Number | None = supported(SPECTRUMKV, "what the KV may cost relative to FP16, of the policy's kind")
    policy: Text | None = supported(SPECTRUMKV, "which token gets which precision")
    scorer: Text | None = supported(SPECTRUMKV, "how tokens are ranked")
    codec: Text | None = supported(SPECTRUMKV, "how tokens are coded")
    scope: Text | None = supported(SPECTRUMKV, "`layer` or `model`: whether each layer has tiers of its own")
    map: Annotated[bool | Literal["layers"] | None, BeforeValidator(_read_map)] = supported(
        SPECTRUMKV,
        '`true`: `usage.kv.map` says at what precision each token was sent; `"layers"`: in each layer, too',
    )

    @property
    def map_detail(self) -> str | None:
        """What map the client asks for; None is none."""
        return LAYERS if self.map == LAYERS else TOKENS if self.map else None

    def choice(self) -> KvChoice:
        """Return what the client sends."""
        return KvChoice(
            budget=self.budget, policy=self.policy, scorer=self.scorer, codec=self.codec, scope=self.scope
        )
