"""The openai package, with its asynchronous client: streams side by side, and one that is left."""

import asyncio
import os
import time
import urllib.request

import openai

MESSAGES = [{"role": "user", "content": "Count from one to fifty."}]
METRICS = os.environ["BASE_URL"].removesuffix("/v1") + "/metrics"


def metric(name: str) -> float:
    """A metric of the gateway's."""
    with urllib.request.urlopen(METRICS, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


async def read(client: openai.AsyncOpenAI, tokens: int) -> str:
    stream = await client.chat.completions.create(
        model="SmolLM2-135M-Instruct", messages=MESSAGES, stream=True, temperature=0, max_tokens=tokens
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def leave(client: openai.AsyncOpenAI) -> None:
    """Leave a stream after its first event: the gateway ends the request within a second."""
    left = metric('spectrumkv_gateway_requests_total{route="/v1/chat/completions",status="499"')
    stream = await client.chat.completions.create(
        model="SmolLM2-135M-Instruct", messages=MESSAGES, stream=True, max_tokens=2000
    )
    await anext(aiter(stream))
    started = time.monotonic()
    await stream.close()
    while metric('spectrumkv_gateway_requests_total{route="/v1/chat/completions",status="499"') == left:
        assert time.monotonic() - started < 1.0, "the request still runs"
        await asyncio.sleep(0.02)


async def main() -> None:
    async with openai.AsyncOpenAI(base_url=os.environ["BASE_URL"], max_retries=0) as client:
        answers = await asyncio.gather(*(read(client, 8) for _ in range(8)))
        assert len(set(answers)) == 1, answers
        assert answers[0]
        await leave(client)


asyncio.run(main())
