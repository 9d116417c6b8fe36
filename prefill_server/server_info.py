"""What prefill tells of itself: what is served, the defaults, and what a request may ask for."""

from importlib.metadata import version

from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.fixed_rate.kernel_fault import kernel_fault
from spectrumkv.common.kv.plan import SCOPES
from spectrumkv.common.kv.policies import Policy, policies
from spectrumkv.common.kv.scoring import scorers
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.common.tool_calls import format_of_template
from spectrumkv.prefill_server.transfer.plan import default_budget
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.prefill_server.workers import WorkerPool
from spectrumkv.v1 import kv_pb2, prefill_pb2

# Read once: it is a file of its own, which cannot be opened when a process has no file descriptors left.
_VERSION = version("spectrumkv")


def server_info(
    loaded: LoadedModel, config: PrefillConfig, verdict: ProbeVerdict, workers: WorkerPool
) -> prefill_pb2.PrefillServiceGetServerInfoResponse:
    """Return what a service is and what it takes.

    Args:
        loaded: the model.
        config: the service's options.
        verdict: how strongly KV may be coded where a request leaves that open.
        workers: the decode workers, as they are now.
    """
    template = loaded.tokenizer.chat_template
    return prefill_pb2.PrefillServiceGetServerInfoResponse(
        version=_VERSION,
        model_name=loaded.name,
        model=loaded.spec.to_proto(),
        device=str(loaded.device),
        policies=[_policy_info(policies.get(name)) for name in policies],
        scorers=scorers.names(),
        codecs=[kv_pb2.CodecId(name=name, version=codecs.get(name).version) for name in codecs],
        scopes=SCOPES,
        defaults=prefill_pb2.KvOptions(
            budget=default_budget(policies.get(config.policy), config, verdict),
            policy=config.policy,
            scorer=config.scorer,
            codec=config.codec,
            scope=config.scope,
        ),
        probe=verdict.to_proto(),
        decode_workers=[str(address) for address in workers.known],
        decode_workers_away=[str(address) for address in workers.away],
        decode_workers_ejected=[str(worker.address) for worker in workers.ejected],
        decode_worker_rooms=[
            prefill_pb2.DecodeWorkerRoom(
                address=str(one.address), slots_total=one.total_slots, slots_free=one.free_slots
            )
            for one in workers.workers
        ],
        has_chat_template=bool(template),
        kernel_fault=kernel_fault(),
        tool_call_format=format_of_template(str(template)).name if template else "",
    )


def _policy_info(policy: Policy) -> prefill_pb2.PolicyInfo:
    return prefill_pb2.PolicyInfo(
        name=policy.name,
        min_budget=policy.min_budget,
        max_budget=policy.max_budget,
        budget_kind=f"BUDGET_KIND_{policy.budget_kind.name}",
    )
