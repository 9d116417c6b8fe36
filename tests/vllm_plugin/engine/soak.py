"""Sends a pair of vLLM servers many requests through the proxy, and looks at each answer.

Lengths and budgets are mixed, some clients leave at random moments, and servers are killed on the way.
"""

import asyncio
import itertools
import json
import random
import statistics
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from spectrumkv.bench.vllm.predictions import divergence

GENERATED, TOP = 8, 20
SHORTEST, LONGEST = 24, 700
PARAMS: tuple[dict[str, Any], ...] = ({"policy": "native"}, {"budget": 0.5}, {"budget": 0.3})
# One in so many clients leaves.
LEAVES = 10
PREFIX, DONE = b"data: ", b"data: [DONE]"


@dataclass(frozen=True)
class Wish:
    """What one client asks.

    Attributes:
        prompt: its token ids.
        params: `kv_transfer_params`.
        leaves: at which share of the time that a request usually takes the client leaves; None if it stays.
        salt: of prefix caches: no KV is shared with requests that have another.
    """

    prompt: list[int]
    params: dict[str, Any]
    leaves: float | None
    salt: str = "soak"

    @property
    def body(self) -> dict[str, Any]:
        return {
            "model": "tiny", "prompt": self.prompt, "max_tokens": GENERATED, "temperature": 0, "ignore_eos": True,
            "logprobs": TOP, "return_tokens_as_token_ids": True, "stream": True, "kv_transfer_params": self.params,
            "cache_salt": self.salt,
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What one client got.

    Attributes:
        wish: what it asked.
        outcome: "answered", "left" or "failed".
        tokens: that were generated.
        predictions: log-probabilities by token id, of each of them.
        reason: why it failed.
    """

    wish: Wish
    outcome: str
    tokens: list[int] = field(default_factory=list)
    predictions: list[dict[int, float]] = field(default_factory=list)
    reason: str = ""


def wishes(number: int, seed: int = 0) -> list[Wish]:
    """Requests whose prompts have nothing in common."""
    drawn = random.Random(seed)
    return [
        Wish(
            prompt=[drawn.randrange(3, 40000) for _ in range(drawn.randint(SHORTEST, LONGEST))],
            params=PARAMS[place % len(PARAMS)],
            leaves=drawn.random() if place % LEAVES == LEAVES - 1 else None,
        )
        for place in range(number)
    ]


class Soak:
    """Clients of a proxy, several at once.

    Args:
        url: of the proxy.
        clients: how many there are at once.
        kills: what kills a server and returns when it is back, by the number of the request that it comes before.
    """

    def __init__(
        self, url: str, clients: int, kills: Mapping[int, Callable[[], Awaitable[None]]] | None = None
    ) -> None:
        self._url, self._clients, self._kills = url, clients, kills or {}
        self._all_is_well = asyncio.Event()
        self._all_is_well.set()
        self._seconds = [1.0]

    async def run(self, asked: list[Wish]) -> list[Answer]:
        """Send all requests; while a server is away, only those that were sent before go on."""
        answers: list[Answer] = []
        numbered = iter(enumerate(asked))
        timeout = aiohttp.ClientTimeout(total=240)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(self._client(session, numbered, answers) for _ in range(self._clients)))
        return answers

    async def _client(
        self, session: aiohttp.ClientSession, numbered: Iterator[tuple[int, Wish]], answers: list[Answer]
    ) -> None:
        while True:
            await self._all_is_well.wait()
            number, wish = next(numbered, (-1, None))
            if wish is None:
                return
            if number in self._kills:
                self._all_is_well.clear()
                await self._kills[number]()
                self._all_is_well.set()
            answers.append(await self._ask(session, wish))

    async def _ask(self, session: aiohttp.ClientSession, wish: Wish) -> Answer:
        began = asyncio.get_running_loop().time()
        usual = statistics.median(self._seconds)
        try:
            async with asyncio.timeout(None if wish.leaves is None else wish.leaves * usual):
                answer = await self._read(session, wish)
        except TimeoutError:
            return Answer(wish, "failed" if wish.leaves is None else "left", reason="no answer in time")
        except aiohttp.ClientError as error:
            return Answer(wish, "failed", reason=repr(error))
        self._seconds.append(asyncio.get_running_loop().time() - began)
        return answer

    async def _read(self, session: aiohttp.ClientSession, wish: Wish) -> Answer:
        tokens: list[int] = []
        predictions: list[dict[int, float]] = []
        async with session.post(f"{self._url}/v1/completions", json=wish.body) as answer:
            if answer.status != 200:
                return Answer(wish, "failed", reason=f"{answer.status} {await answer.text()}")
            async for line in answer.content:
                if not line.startswith(PREFIX) or line.startswith(DONE):
                    continue
                event = json.loads(line.removeprefix(PREFIX))
                if "error" in event:
                    return Answer(wish, "failed", reason=str(event["error"]))
                for choice in event["choices"]:
                    listed = choice.get("logprobs") or {"tokens": [], "top_logprobs": []}
                    tokens += map(_token_id, listed["tokens"])
                    predictions += [
                        {_token_id(name): value for name, value in one.items()} for one in listed["top_logprobs"]
                    ]
        if len(tokens) != GENERATED:
            return Answer(wish, "failed", tokens, predictions, f"{len(tokens)} of {GENERATED} tokens came")
        return Answer(wish, "answered", tokens, predictions)


async def exact_predictions(url: str, answers: list[Answer], at_once: int) -> list[list[dict[int, float]]]:
    """Log-probabilities of each answer's tokens as a server has them that computes prompt and answer itself."""
    numbers = itertools.count()
    found: list[list[dict[int, float]]] = [[] for _ in answers]
    timeout = aiohttp.ClientTimeout(total=240)
    # vLLM closes connections that it kept for 5 s, perhaps as the next request is sent.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def work() -> None:
            while (number := next(numbers)) < len(answers):
                one = answers[number]
                body = {
                    "model": "tiny", "prompt": one.wish.prompt + one.tokens, "max_tokens": 1, "prompt_logprobs": TOP,
                    "temperature": 0, "cache_salt": f"exact {number}",
                }  # fmt: skip
                async with session.post(f"{url}/v1/completions", json=body) as answer:
                    answer.raise_for_status()
                    listed = (await answer.json())["choices"][0]["prompt_logprobs"][-len(one.tokens) :]
                found[number] = [
                    {int(token): value["logprob"] for token, value in prediction.items()} for prediction in listed
                ]

        await asyncio.gather(*(work() for _ in range(at_once)))
    return found


@dataclass(frozen=True)
class Distance:
    """How far an answer is from exact.

    Attributes:
        worst: the largest difference of a generated token's log-probability.
        mean: their mean.
        kl: mean over tokens, in nats, of the most likely tokens; blind where these have nothing in common.
    """

    worst: float
    mean: float
    kl: float

    @classmethod
    def of(cls, answer: Answer, exact: list[dict[int, float]], places: int = GENERATED) -> "Distance":
        """Compare the first `places` tokens of an answer."""
        compared = list(zip(answer.tokens, answer.predictions, exact, strict=True))[:places]
        differences = [abs(mine[token] - theirs[token]) for token, mine, theirs in compared]
        kl = [divergence(mine, theirs) for _, mine, theirs in compared]
        return cls(max(differences), statistics.fmean(differences), statistics.fmean(kl))

    def is_at_most(self, other: "Distance") -> bool:
        return self.worst <= other.worst and self.mean <= other.mean and self.kl <= other.kl

    def doubled(self) -> "Distance":
        """What an answer to the same question may differ by: rounding depends on what else is computed with it."""
        return Distance(2 * self.worst + 0.1, 2 * self.mean + 0.02, 2 * self.kl + 1e-3)


def places_with_one_past(one: Answer, other: Answer) -> int:
    """In how many places two answers to one question are predicted from the same tokens."""
    return next(
        (
            place + 1
            for place, (mine, theirs) in enumerate(zip(one.tokens, other.tokens, strict=True))
            if mine != theirs
        ),
        GENERATED,
    )


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))
