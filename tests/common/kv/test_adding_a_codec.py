"""The codec and the policy of docs/adding-a-codec.md, taken from the page itself, carry a prompt."""

import re
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.common.kv.codecs import codecs
from spectrumkv.common.kv.codecs.tiered import tier_codecs
from spectrumkv.common.kv.geometry import NATIVE_DTYPES, KvGeometry
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.tiers import Tier
from spectrumkv.common.kv.wire import ChunkReader, ChunkTotals, KvChunk
from spectrumkv.common.registry import Registry
from spectrumkv.common.rpc.decode_stream import deserialize_request, serialize_request
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.transfer.pipeline import FirstToken, KvPipeline
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import decode_pb2, prefill_pb2
from tests.common.kv.codecs import test_codecs
from tests.common.kv.exact_prompts import capture
from tests.common.kv.policies import test_policy

PAGE = Path(__file__).parents[3] / "docs" / "adding-a-codec.md"
# A file in full begins with its path.
EXAMPLE = re.compile(r"^```python\n(plan = .*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^```python\n# (common/kv/\S+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GEOMETRY = KvGeometry(layers=2, kv_heads=2, head_dim=80, native_dtype=torch.float32)
TOKENS = 130


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register what the page defines; afterwards the registries are as they were."""
    registries: tuple[Registry, ...] = (codecs, policies)
    for registry in registries:
        monkeypatch.setattr(registry, "_choices", dict(registry._choices))
    for path, text in FILE.findall(PAGE.read_text()):
        name = "spectrumkv." + path.removesuffix(".py").replace("/", ".")
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(text, f"{PAGE}: {path}", "exec"), module.__dict__)


def test_the_page_has_one_file_of_each() -> None:
    folders = [str(Path(path).parent) for path, _ in FILE.findall(PAGE.read_text())]
    assert folders == ["common/kv/codecs", "common/kv/policies"]


@pytest.mark.parametrize("budget", [0.05, 0.4, 1.0])
def test_a_prompt_sent_through_them_comes_back(registered: None, budget: float) -> None:
    verdict = ProbeVerdict.from_flag("on", GEOMETRY.layers)
    options = prefill_pb2.KvOptions(policy="recent", budget=budget)
    plan = KvPlan.resolve(options, PrefillConfig(), verdict, seed=0)
    assert plan.codec.name == "half"
    begin = decode_pb2.Begin(codec=plan.codec_id, prompt_token_ids=range(TOKENS))
    pipeline = KvPipeline(begin, plan, GEOMETRY, 4096, Metrics(CollectorRegistry()))
    sent = [capture(GEOMETRY, layer, TOKENS) for layer in range(GEOMETRY.layers)]
    for layer in sent:
        pipeline.put_layer(layer)
    pipeline.put_first_tokens(FirstToken(42, finished=False))

    received = torch.full((GEOMETRY.layers, 2, GEOMETRY.kv_heads, TOKENS, GEOMETRY.head_dim), torch.nan)
    decoder, reader = plan.decoder(GEOMETRY), ChunkReader(GEOMETRY.layers, TOKENS)
    _, *chunks, closing = (deserialize_request(serialize_request(message)) for message in pipeline.messages())
    for chunk in chunks:
        assert isinstance(chunk, KvChunk)
        for segment in reader.read(chunk):
            span = slice(segment.first_token, segment.first_token + segment.tiers.numel())
            keys, values = received[segment.layer, :, :, span]
            assert sum(decoder.decode(segment, keys, values).values()) == segment.body.numel()
    reader.finish(ChunkTotals(closing.end.chunks, closing.end.payload_bytes, closing.end.digest))

    kept = int(budget * TOKENS)
    for layer in sent:
        arrived = received[layer.layer, :, :, TOKENS - kept :]
        # Multiples of 1/8 survive 16 bits.
        assert torch.equal(arrived, torch.stack([layer.keys, layer.values])[:, :, TOKENS - kept :])
        assert received[layer.layer, :, :, : TOKENS - kept].isnan().all()


def test_the_example_without_services_is_right(registered: None) -> None:
    [example] = EXAMPLE.findall(PAGE.read_text())
    captures = [capture(GEOMETRY, layer, TOKENS) for layer in range(GEOMETRY.layers)]
    keys, values = torch.full((2, GEOMETRY.layers, GEOMETRY.kv_heads, TOKENS, GEOMETRY.head_dim), torch.nan)
    names = {
        "config": PrefillConfig(),
        "verdict": ProbeVerdict.from_flag("on", GEOMETRY.layers),
        "geometry": GEOMETRY,
        "tokens": TOKENS,
        "captures": captures,
        "keys": keys,
        "values": values,
    }
    exec(compile(example, str(PAGE), "exec"), {"KvPlan": KvPlan, "prefill_pb2": prefill_pb2} | names)
    kept = slice(TOKENS - int(0.4 * TOKENS), TOKENS)
    for layer in captures:
        assert torch.equal(keys[layer.layer][:, kept], layer.keys[:, kept])
        assert torch.equal(values[layer.layer][:, kept], layer.values[:, kept])
    assert keys[:, :, : kept.start].isnan().all()


def test_the_codec_passes_the_tests_of_codecs(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    half = tier_codecs()["half"]
    assert half.tiers == {Tier.DROP, Tier.FP16}
    monkeypatch.setitem(test_codecs.CODECS, "half", half)
    for geometry in (one.values[0] for one in test_codecs.GEOMETRIES):
        assert isinstance(geometry, KvGeometry)
        test_codecs.test_every_token_comes_back_within_its_tier(name="half", geometry=geometry)
        for offset in (1, 2):
            test_codecs.test_a_body_may_start_anywhere("half", geometry, offset)
    for side, poison, dtype in product(("keys", "values"), (np.nan, np.inf, -np.inf), NATIVE_DTYPES):
        test_codecs.test_what_is_not_finite_is_refused_at_each_tier("half", side, poison, dtype)
    test_codecs.test_a_body_of_another_length_is_refused("half")
    test_codecs.test_states_that_do_not_fit_the_geometry_are_refused("half")


def test_the_policy_passes_the_tests_of_policies(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(test_policy.UNSPENT, "recent", 1.0)
    test_policy.test_every_policy_gives_each_token_a_known_tier_and_keeps_one(name="recent")
    test_policy.test_no_policy_spends_more_than_its_budget_nor_leaves_a_token_unspent(name="recent")
    test_policy.test_policies_that_say_so_do_not_look_at_scores(name="recent")


def test_nothing_stays_registered() -> None:
    assert "half" not in codecs
    assert "recent" not in policies
