"""Both services, open to attack: hostile sequences on every RPC, and what an honest request gets all the while."""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from spectrumkv.client.request import Sampling, TokenIds
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis
from spectrumkv.common.model.load import LoadedModel
from tests.faults.damage.damage import METHOD
from tests.faults.hostile.basis import upload
from tests.faults.hostile.messages import sequence
from tests.faults.hostile.requests import generate_request
from tests.services.pair import Pair, wait_until_nothing_is_held

GENERATE = "/spectrumkv.v1.PrefillService/Generate"
PUT_BASIS = "/spectrumkv.v1.DecodeService/PutBasis"
BASES_REMEMBERED = 8
# Long enough for the default policy to code most tokens by spectra.
HONEST_PROMPT = TokenIds(tuple(range(100, 148)))
STREAMS = 32
ANSWERS = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "RESOURCE_EXHAUSTED",
    "DATA_LOSS",
    # Prompt KV of NaN and infinities makes logits of NaN: that request's own fault, named as such.
    "INTERNAL",
}
INTERNAL_SENTENCES = ("logits", "Exception deserializing request")


@dataclass
class Target:
    """Both services, raw channels to them, and what an honest request gets."""

    pair: Pair
    decode: grpc.Channel
    prefill: grpc.Channel
    basis: CalibratedBasis
    other_bases: deque[bytes] = field(default_factory=lambda: deque(maxlen=BASES_REMEMBERED))
    expected: tuple[int, ...] = ()

    def __repr__(self) -> str:
        # Hypothesis shows arguments of failed tests: not all of the model and the basis.
        return "Target()"

    @property
    def loaded(self) -> LoadedModel:
        return self.pair.prefill

    def honest(self, tokens: int = 12) -> tuple[int, ...]:
        with self.pair.client() as client:
            sampling = Sampling(max_tokens=tokens, ignore_eos=True)
            return client.generate(HONEST_PROMPT, sampling=sampling).result().token_ids

    def wait_until_nothing_is_held(self) -> None:
        wait_until_nothing_is_held(self.pair.prefill_metrics, self.pair.decode_metrics, seconds=10)

    def attack_decode(self, chance: random.Random) -> tuple[str, str]:
        """Send a hostile Decode stream; return what it carried, and the status."""
        hostile = sequence(chance, self.loaded, self.basis, self.other_bases)
        status = status_of(self.decode.stream_stream(METHOD)(iter(hostile.messages), timeout=60))
        return f"Decode {hostile.codec}", status

    def attack_bases(self, chance: random.Random) -> tuple[str, str]:
        """Upload a hostile basis; streams that follow may name it where decode took it."""
        digest, messages = upload(chance, self.basis)
        status = status_of(self.decode.stream_stream(PUT_BASIS)(iter(messages), timeout=60))
        if status == "OK":
            self.other_bases.append(digest)
        return "PutBasis", status

    def attack_prefill(self, chance: random.Random) -> tuple[str, str]:
        return "Generate", status_of(self.prefill.unary_stream(GENERATE)(generate_request(chance), timeout=60))


def status_of(call: Iterator[bytes]) -> str:
    """Read a stream to its end and return its status, which must be one that a caller can act on."""
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        code, details = error.code().name, error.details() or ""
        assert code in ANSWERS, f"{code}: {details}"
        assert code != "INTERNAL" or any(one in details for one in INTERNAL_SENTENCES), details
        return code
    return "OK"
