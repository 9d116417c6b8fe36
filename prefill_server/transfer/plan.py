"""What a request's KV options come to, once the server's defaults and the probe's verdict are in."""

from dataclasses import dataclass, replace

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.codecs.base import Codec, SegmentDecoder, TierCodec, codecs, needed_basis
from spectrumkv.common.kv.codecs.encoder import KvEncoder, TieredEncoder
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.codecs.spectral.encoder import SpectralEncoder
from spectrumkv.common.kv.codecs.spectral.fixed_width import FixedWidthEncoder, least_budget
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies import Policy, policies
from spectrumkv.common.kv.policies.int4_layers import Int4Layers
from spectrumkv.common.kv.scoring import scorers
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import kv_pb2, prefill_pb2

SCOPES = ("layer", "model")
# What a codec must be able to write for policies that do not name one.
SPECTRUM = frozenset({Tier.DROP, Tier.INT4, Tier.INT8, Tier.FP16})
# Writes what a codec that spends budgets itself would, where that is too slow.
FIXED_WIDTH_CODEC = "absmax"


@dataclass(frozen=True)
class KvPlan:
    """How one request's KV is scored, tiered and coded.

    Attributes:
        policy: gives tokens their tiers.
        budget: in the policy's range: counted bytes where the policy leaves tiers to its codec, else the mean
            nominal cost per token.
        scorer: name of the scorer.
        codec: writes the tiers.
        scope: "layer" for tiers by each layer's scores, "model" for one tier per token in all layers.
        int4: layers that may be sent at INT4.
        seed: for scorers and policies that draw.
        basis: the model's, for codecs that need one; None where there is none.
        codec_is_open: whether the request left the codec to the server, and the policy has more than one.
        codec_reason: why a codec other than the policy's own was chosen; empty where it was not.
    """

    policy: Policy
    budget: float
    scorer: str
    codec: Codec
    scope: str
    int4: Int4Layers
    seed: int
    basis: SpectralBasis | None = None
    codec_is_open: bool = False
    codec_reason: str = ""

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise InvalidArgumentError(f"unknown scope {self.scope!r}; valid: {', '.join(SCOPES)}")
        if self.policy.budget_is_counted and self.scope == "model":
            raise InvalidArgumentError(
                f"policy {self.policy.name!r} codes each layer by its own scores; scope 'model' is for other policies"
            )

    @classmethod
    def resolve(
        cls,
        options: prefill_pb2.KvOptions,
        config: PrefillConfig,
        verdict: ProbeVerdict,
        seed: int,
        basis: SpectralBasis | None = None,
    ) -> "KvPlan":
        """Fill what a request leaves open from the server's configuration, and what that leaves open from the probe.

        Raises:
            InvalidArgumentError: a name is unknown, or the budget is out of the policy's range.
            FailedPreconditionError: the codec needs a basis and there is none.
        """
        policy, scorer, codec = _named(options, config)
        requested = options.budget if options.HasField("budget") else None
        if codec.needs_basis or policy.budget_is_counted:
            needed_basis(codec, basis)
        return cls(
            policy=policy,
            budget=policy.resolve_budget(requested, default_budget(policy, config, verdict)),
            scorer=scorer,
            codec=codec,
            scope=options.scope or ("layer" if policy.budget_is_counted else config.scope),
            int4=verdict.int4,
            seed=seed,
            basis=basis,
            codec_is_open=policy.budget_is_counted and not options.codec,
        )

    def at_fixed_width(self, reason: str) -> "KvPlan":
        """The same allocation, written at whole widths, and why."""
        return replace(self, codec=codecs.get(FIXED_WIDTH_CODEC), codec_reason=reason)

    @property
    def streams_chunks(self) -> bool:
        """Whether tokens can leave before the rest of their prompt is computed."""
        return self.policy.token_by_token and self.scope == "layer"

    @property
    def codec_id(self) -> kv_pb2.CodecId:
        """What Begin says of the codec."""
        digest = self.basis.digest if self.codec.needs_basis and self.basis is not None else b""
        return kv_pb2.CodecId(name=self.codec.name, version=self.codec.version, basis_digest=digest)

    def encoder(self, geometry: KvGeometry, tokens: int, framing_bytes: int) -> KvEncoder:
        """Return what codes a prompt's layers.

        Args:
            geometry: shape and dtype of the model's cache.
            tokens: of the prompt.
            framing_bytes: what the messages take besides the segments; a counted budget pays for it.

        Raises:
            InvalidArgumentError: fixed widths cannot keep to the budget.
        """
        budget_bytes = int(self.budget * geometry.fp16_bytes(tokens)) - framing_bytes
        if self.policy.budget_is_counted and isinstance(self.codec, TierCodec):
            self._check_width(self.codec, geometry)
            basis = needed_basis(self.codec, self.basis)
            return FixedWidthEncoder(basis, self.codec, geometry, tokens, budget_bytes, self.scorer)
        if isinstance(self.codec, TierCodec):
            return TieredEncoder(
                self.policy,
                self.budget,
                self.scorer,
                self.codec,
                self.scope,
                self.int4,
                self.seed,
                geometry,
            )
        return SpectralEncoder(needed_basis(self.codec, self.basis), geometry, tokens, budget_bytes, self.scorer)

    def _check_width(self, codec: TierCodec, geometry: KvGeometry) -> None:
        if self.budget < (least := least_budget(codec, geometry)):
            raise InvalidArgumentError(
                f"codec {codec.name!r} takes {least:.3f} of FP16 with every token at INT4, and the budget is "
                f"{self.budget:g}; ask for more, or leave the codec to the server"
            )

    def decoder(self, geometry: KvGeometry) -> SegmentDecoder:
        """Return what decodes this plan's segments, as a decode worker would."""
        return self.codec.decoder(geometry, self.basis)


def check_defaults(config: PrefillConfig) -> None:
    """Refuse defaults that no request could use.

    Raises:
        InvalidArgumentError: a name is unknown, the codec cannot write what policies give, or the budget is out of
            the policy's range.
    """
    codec = codecs.get(config.codec)
    if not codec.tiers >= SPECTRUM:
        raise InvalidArgumentError(
            f"--codec is {codec.name!r}, which does not write all tiers; it is for policies that name no codec of "
            f"their own: {', '.join(name for name in codecs if codecs.get(name).tiers >= SPECTRUM)}"
        )
    policy, _, _ = _named(prefill_pb2.KvOptions(), config)
    if config.budget is not None:
        policy.check_budget(config.budget)


def default_budget(policy: Policy, config: PrefillConfig, verdict: ProbeVerdict) -> float:
    """Return the budget of a request that names none: the operator's word, or else what the probe found."""
    return verdict.default_budget(policy) if config.budget is None else config.budget


def _named(options: prefill_pb2.KvOptions, config: PrefillConfig) -> tuple[Policy, str, Codec]:
    """Policy, scorer's name and codec of a request, what it leaves open filled in from the configuration."""
    policy = policies.get(options.policy or config.policy)
    scorer = options.scorer or config.scorer
    scorers.get(scorer)
    codec = codecs.get(options.codec or policy.codec or config.codec)
    _check_codec(policy, codec)
    return policy, scorer, codec


def _check_codec(policy: Policy, codec: Codec) -> None:
    """Refuse a codec that cannot write the policy's tiers."""
    at_fixed_width = policy.budget_is_counted and codec.tiers >= SPECTRUM
    if policy.codec not in (None, codec.name) and not at_fixed_width:
        raise InvalidArgumentError(
            f"policy {policy.name!r} is written by codec {policy.codec!r}, not by {codec.name!r}"
        )
    if policy.codec is None and not codec.tiers >= SPECTRUM:
        raise InvalidArgumentError(
            f"codec {codec.name!r} cannot write policy {policy.name!r}: "
            f"it only has {', '.join(tier.label for tier in sorted(codec.tiers))}"
        )
