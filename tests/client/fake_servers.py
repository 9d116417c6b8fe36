"""Services that answer as they are told, behind a real socket."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from spectrumkv.common.rpc.server import Server
from spectrumkv.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    generation_pb2,
    kv_pb2,
    prefill_pb2,
    prefill_pb2_grpc,
)

Answer = Callable[[prefill_pb2.GenerateRequest, grpc.ServicerContext], Iterator[prefill_pb2.GenerateResponse]]


def token(
    index: int, text: str, token_id: int | None = None, answer: int = 0, ends: str | None = None
) -> prefill_pb2.GenerateResponse:
    message = generation_pb2.Token(
        index=index, token_id=100 + index if token_id is None else token_id, text=text, answer=answer
    )
    if ends is not None:
        message.finish_reason = generation_pb2.FinishReason.Value(f"FINISH_REASON_{ends}")
    return prefill_pb2.GenerateResponse(token=message)


def finished(completion_tokens: int, reason: str = "STOP") -> prefill_pb2.GenerateResponse:
    usage = generation_pb2.Usage(
        prompt_tokens=40,
        completion_tokens=completion_tokens,
        tiers=[
            generation_pb2.TierUsage(tier=kv_pb2.TIER_FP16, tokens=4.0, bytes=1600),
            generation_pb2.TierUsage(tier=kv_pb2.TIER_INT8, tokens=36.0, bytes=7200),
        ],
        kv_bytes_sent=9000,
        kv_fp16_bytes=16000,
        budget_counted=0.5625,
        budget_nominal=0.55,
        ttft_seconds=0.125,
        handoff_seconds=0.25,
        policy="greedy",
        scorer="attention",
        codec="absmax",
        decode_worker="127.0.0.1:50052",
    )
    reason_value = generation_pb2.FinishReason.Value(f"FINISH_REASON_{reason}")
    return prefill_pb2.GenerateResponse(
        finished=prefill_pb2.GenerateFinished(finish_reason=reason_value, usage=usage)
    )


def answer_three_tokens(request: Any, context: Any) -> Iterator[prefill_pb2.GenerateResponse]:
    yield token(0, "Blue")
    yield token(1, " sky")
    yield token(2, "!", ends="STOP")
    yield finished(3)


def prefill_info() -> prefill_pb2.PrefillServiceGetServerInfoResponse:
    return prefill_pb2.PrefillServiceGetServerInfoResponse(
        version="0.1.0",
        model_name="tiny-llama",
        model=kv_pb2.ModelSpec(
            architecture="llama", layers=30, kv_heads=3, head_dim=64, dtype="float32", context_length=8192
        ),
        device="cpu",
        policies=[
            prefill_pb2.PolicyInfo(
                name="greedy", min_budget=0.25, max_budget=1.0, budget_kind=prefill_pb2.BUDGET_KIND_TIER_COST
            )
        ],
        scorers=["attention", "position"],
        codecs=[kv_pb2.CodecId(name="absmax", version=1)],
        scopes=["layer", "model"],
        defaults=prefill_pb2.KvOptions(budget=0.5, policy="adaptive"),
        probe=prefill_pb2.ProbeVerdict(
            int4_allowed=True,
            source="probe",
            reason="2 of 3 needles [found]",
            settings=[
                prefill_pb2.ProbedSetting(
                    policy="spectral",
                    codec="spectral",
                    budget=0.25,
                    found_fp16=3,
                    found=3,
                    kl=4.9e-5,
                    ppl_delta_pct=0.038,
                    safe=True,
                ),
                prefill_pb2.ProbedSetting(
                    policy="spectral",
                    codec="spectral",
                    budget=0.2,
                    found_fp16=3,
                    found=2,
                    kl=2.2e-4,
                    ppl_delta_pct=-0.5,
                ),
            ],
            safe_budget=0.25,
            trials=[
                prefill_pb2.ProbeTrial(prompt_tokens=512, depth=0.25, found=True, found_fp16=True, answer="[/b] 7"),
                prefill_pb2.ProbeTrial(prompt_tokens=512, depth=0.75, found=False, found_fp16=True, answer="no"),
            ],
        ),
        decode_workers=["127.0.0.1:50052", "127.0.0.1:50062", "127.0.0.1:50072"],
        decode_workers_away=["127.0.0.1:50062"],
        decode_workers_ejected=["127.0.0.1:50072"],
        has_chat_template=True,
        kernel_fault="slots differ by 2",
    )


@dataclass
class FakePrefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Records requests and answers them with `answer`."""

    answer: Answer = answer_three_tokens
    requests: list[prefill_pb2.GenerateRequest] = field(default_factory=list)
    detokenized: list[list[int]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    address: str = ""
    tool_call_format: str = ""

    def Generate(  # noqa: N802
        self, request: prefill_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[prefill_pb2.GenerateResponse]:
        self.requests.append(request)
        context.add_callback(self.ended.set)
        yield from self.answer(request, context)

    def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        info = prefill_info()
        info.tool_call_format = self.tool_call_format
        return info

    def Tokenize(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests.append(request.request)
        return prefill_pb2.TokenizeResponse(token_ids=[5, 6], context_length=8192)

    def Detokenize(self, request: Any, context: Any) -> Any:  # noqa: N802
        texts = [f"<{one}>" for one in request.token_ids]
        self.detokenized.append(list(request.token_ids))
        return prefill_pb2.DetokenizeResponse(text="".join(texts), token_texts=texts)


class FakeDecode(decode_pb2_grpc.DecodeServiceServicer):
    def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        return decode_pb2.DecodeServiceGetServerInfoResponse(
            version="0.1.0",
            model_name="tiny-llama",
            codecs=[kv_pb2.CodecId(name="absmax", version=1)],
            device="cpu",
            slots_total=2**40,
            slots_used=512,
            requests_running=2,
        )


def prefill_server(service: FakePrefill, threads: int = 4) -> Server:
    return Server(
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
        service,
        "spectrumkv.v1.PrefillService",
        threads=threads,
        count_ended=lambda code: None,
    )


def decode_server() -> Server:
    return Server(
        decode_pb2_grpc.add_DecodeServiceServicer_to_server,
        FakeDecode(),
        "spectrumkv.v1.DecodeService",
        threads=2,
        count_ended=lambda code: None,
    )


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """Serve on a free port and yield the address."""
    address = f"127.0.0.1:{server.bind('127.0.0.1:0')}"
    server.start()
    try:
        yield address
    finally:
        stop(server)


def stop(server: Server) -> None:
    """End at once."""
    hurried = threading.Event()
    hurried.set()
    server.drain(0, hurried)
