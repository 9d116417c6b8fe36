"""How one request's KV is scored, tiered and coded: its options, completed by configuration and probe."""

from dataclasses import dataclass, replace

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.budget import BudgetKind
from spectrumkv.common.kv.codecs.base import Codec, codecs, needed_basis
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.plan import CodingPlan
from spectrumkv.common.kv.policies import Policy, policies
from spectrumkv.common.kv.scoring import scorers
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import kv_pb2, prefill_pb2


@dataclass(frozen=True)
class KvPlan(CodingPlan):
    """The way in which one request's KV is scored, tiered and coded.

    Attributes:
        codec_is_open: whether the request left the codec to the server.
        uses_fallback: whether a codec writes the plan that stands in for the policy's own.
        codec_reason: why it does, for people; empty where it does not.
    """

    codec_is_open: bool = False
    uses_fallback: bool = False
    codec_reason: str = ""

    @classmethod
    def resolve(
        cls,
        options: prefill_pb2.KvOptions,
        config: PrefillConfig,
        verdict: ProbeVerdict,
        seed: int,
        basis: Basis | None = None,
    ) -> "KvPlan":
        """Fill what a request leaves open from the server's configuration, and what that leaves open from the probe.

        Args:
            options: of the request.
            config: of the server.
            verdict: of the probe.
            seed: of the request.
            basis: the model's; None where there is none.

        Returns:
            The plan.

        Raises:
            InvalidArgumentError: a name is unknown, or the budget is out of the policy's range.
            FailedPreconditionError: the codec needs a basis and there is none.
        """
        policy, scorer, codec = _named(options, config)
        requested = options.budget if options.HasField("budget") else None
        for used in (codec, codecs.get(policy.codec or codec.name)):
            if used.needs_basis:
                needed_basis(used, basis)
        return cls(
            policy=policy,
            budget=policy.resolve_budget(requested, default_budget(policy, config, verdict)),
            scorer=scorer,
            codec=codec,
            scope=options.scope or ("layer" if policy.budget_kind is BudgetKind.BYTES else config.scope),
            int4=verdict.int4,
            seed=seed,
            basis=basis,
            codec_is_open=not options.codec,
        )

    @property
    def fallback(self) -> Codec | None:
        """Return the faster codec that may write the same bit allocation; None if the request named its codec."""
        return self._open_codec(self.codec.fallback)

    @property
    def gpu_codec(self) -> Codec | None:
        """Return the codec with kernels that may write the same bit allocation on a GPU; see `fallback`."""
        return self._open_codec(self.codec.gpu_codec)

    @property
    def basis_free(self) -> Codec | None:
        """Return the codec without a basis that may write the same bit allocation; see `fallback`."""
        return self._open_codec(self.codec.basis_free)

    def _open_codec(self, name: str | None) -> Codec | None:
        return codecs.get(name) if name is not None and self.codec_is_open else None

    def with_fallback(self, fallback: Codec, reason: str) -> "KvPlan":
        """Return the same plan, written by a codec that stands in for its own.

        Args:
            fallback: see `fallback`, `gpu_codec` and `basis_free`.
            reason: for people.
        """
        return replace(self, codec=fallback, uses_fallback=True, codec_reason=reason)

    @property
    def codec_id(self) -> kv_pb2.CodecId:
        """Return what Begin says of the codec."""
        digest = self.codec.basis_digest(self.basis)
        return kv_pb2.CodecId(name=self.codec.name, version=self.codec.version, basis_digest=digest)


def check_defaults(config: PrefillConfig) -> None:
    """Refuse defaults that no request could use.

    Args:
        config: of the server.

    Raises:
        InvalidArgumentError: a name is unknown, the codec cannot write what policies give, or the budget is out of
            the policy's range.
    """
    codec = codecs.get(config.codec)
    if not codec.writes_all_tiers:
        raise InvalidArgumentError(
            f"--codec is {codec.name!r}, which does not write all tiers; it is for policies that name no codec of "
            f"their own: {', '.join(name for name in codecs if codecs.get(name).writes_all_tiers)}"
        )
    policy, _, _ = _named(prefill_pb2.KvOptions(), config)
    if config.budget is not None:
        policy.check_budget(config.budget)


def default_budget(policy: Policy, config: PrefillConfig, verdict: ProbeVerdict) -> float:
    """Return the budget of a request that names none: the configured one, or else what the probe found.

    Args:
        policy: of the request.
        config: of the server.
        verdict: of the probe.

    Returns:
        A budget of the policy's kind; it may lie outside the policy's range.
    """
    return verdict.default_budget(policy) if config.budget is None else config.budget


def _named(options: prefill_pb2.KvOptions, config: PrefillConfig) -> tuple[Policy, str, Codec]:
    """Return policy, scorer and codec of a request; the configuration fills in what it leaves open."""
    policy = policies.get(options.policy or config.policy)
    scorer = options.scorer or config.scorer
    scorers.get(scorer)
    codec = codecs.get(options.codec or policy.codec or config.codec)
    codec.check_policy(policy)
    return policy, scorer, codec
