"""A prefill service that answers in a fixed rhythm, on asyncio: what one core can do is left to the gateway.

python -m tests.gateway.paced_prefill ADDRESS TOKENS SECONDS_BETWEEN
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spectrumkv.v1 import generation_pb2, kv_pb2, prefill_pb2, prefill_pb2_grpc


class PacedPrefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Answer every request with so many tokens, evenly spaced.

    Args:
        tokens: of each answer.
        gap: seconds before each of them.
    """

    def __init__(self, tokens: int, gap: float) -> None:
        self._tokens = tokens
        self._gap = gap

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[prefill_pb2.GenerateResponse]:  # noqa: N802
        """Answer one request."""
        begun = asyncio.get_running_loop().time()
        for index in range(self._tokens):
            await asyncio.sleep(begun + (index + 1) * self._gap - asyncio.get_running_loop().time())
            token = generation_pb2.Token(index=index, token_id=100 + index, text=" word")
            if index == self._tokens - 1:
                token.finish_reason = generation_pb2.FINISH_REASON_LENGTH
            yield prefill_pb2.GenerateResponse(token=token)
        usage = generation_pb2.Usage(prompt_tokens=5, completion_tokens=self._tokens, kv_bytes_sent=1)
        yield prefill_pb2.GenerateResponse(
            finished=prefill_pb2.GenerateFinished(finish_reason=generation_pb2.FINISH_REASON_LENGTH, usage=usage)
        )

    async def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Say which model this is."""
        return prefill_pb2.PrefillServiceGetServerInfoResponse(
            model_name="paced", model=kv_pb2.ModelSpec(context_length=8192)
        )


class _Health(health_pb2_grpc.HealthServicer):
    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


async def _serve(address: str, tokens: int, gap: float) -> None:
    # Like a service's own: callers' keepalive pings are no attack.
    server = grpc.aio.server(options=[("grpc.http2.max_ping_strikes", 0)])
    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(PacedPrefill(tokens, gap), server)
    health_pb2_grpc.add_HealthServicer_to_server(_Health(), server)
    server.add_insecure_port(address)
    await server.start()
    sys.stdout.write("serving\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
