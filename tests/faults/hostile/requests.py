"""Requests to Generate that no honest client sends."""

import math
import random
from typing import Any

from spectrumkv.v1 import prefill_pb2

EDGES_32 = (0, 1, 2, 3, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
EDGES_64 = (*EDGES_32, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
NUMBERS = (0.0, -0.0, 1.0, -1.0, 1e-300, 1e300, -1e300, math.inf, -math.inf, math.nan, 0.5, 100.0)


def harm_sampling(chance: random.Random, sampling: Any) -> None:
    kind = chance.randrange(4)
    if kind == 0:
        name = chance.choice(("temperature", "top_p", "repetition_penalty"))
        setattr(sampling, name, chance.choice(NUMBERS))
    elif kind == 1:
        setattr(sampling, chance.choice(("max_tokens", "top_k", "logprobs")), chance.choice(EDGES_32))
    elif kind == 2:
        sampling.stop.extend(chance.choice(("", "a", "\0", "é" * 300)) for _ in range(chance.randint(1, 40)))
    else:
        sampling.stop_token_ids.extend(chance.choice(EDGES_32) for _ in range(chance.randint(1, 400)))


def generate_request(chance: random.Random) -> bytes:
    """The bytes of a GenerateRequest that is wrong in some way, or not a GenerateRequest at all."""
    request = prefill_pb2.GenerateRequest(request_id=chance.choice(("", "x", "\n", "x" * 5000)))
    kind = chance.randrange(4)
    if kind == 0:
        request.text = chance.choice(("", "Hello", "\0", "\U0010ffff" * 50, "<|im_end|>" * 9, "a b " * 900))
    elif kind == 1:
        request.token_ids.ids.extend(chance.choice((5, 6, *EDGES_32)) for _ in range(chance.choice((0, 1, 5, 3000))))
    elif kind == 2:
        for _ in range(chance.choice((0, 1, 3))):
            request.chat.messages.add(role=chance.choice(("user", "system", "", "root")), content="{{ 7 * 7 }}")
    request.sampling.max_tokens = chance.choice((1, 2, 3, *EDGES_32))
    for _ in range(chance.randint(0, 2)):
        harm_sampling(chance, request.sampling)
    if chance.random() < 0.5:
        request.kv.budget = chance.choice((*NUMBERS, 0.3, 0.7))
    for name in ("policy", "scorer", "codec", "scope"):
        if chance.random() < 0.3:
            setattr(
                request.kv, name, chance.choice(("greedy", "attention", "absmax", "layer", "model", "", "\0", "é"))
            )
    data = request.SerializeToString()
    if chance.random() < 0.3 and data:
        changed = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        data = bytes(changed)
    return data
