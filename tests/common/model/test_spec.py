from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.model.description import spec_of_directory
from spectrumkv.common.model.files.directory import find_model
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.v1 import kv_pb2
from tests.tiny_models import ARCHITECTURES, tiny_model

digests = st.text("0123456789abcdef", min_size=64, max_size=64)
sizes = st.integers(1, (1 << 32) - 1)
specs = st.builds(
    ModelSpec,
    architecture=st.sampled_from(["llama", "gemma2"]),
    weights_digest=digests,
    layers=sizes,
    kv_heads=sizes,
    head_dim=sizes,
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    rope_digest=digests,
    tokenizer_digest=digests,
    vocab_size=sizes,
    context_length=sizes,
)
SPEC = ModelSpec("llama", "0" * 64, 30, 3, 64, "float32", "1" * 64, "2" * 64, 49152, 8192)


def test_the_message_has_the_same_fields() -> None:
    assert {one.name for one in fields(ModelSpec)} == set(kv_pb2.ModelSpec.DESCRIPTOR.fields_by_name)


@given(specs)
def test_survives_the_wire(spec: ModelSpec) -> None:
    sent = spec.to_proto().SerializeToString()
    assert ModelSpec.from_proto(kv_pb2.ModelSpec.FromString(sent)) == spec


@given(specs, specs)
def test_differences_are_exactly_the_fields_that_differ(mine: ModelSpec, theirs: ModelSpec) -> None:
    found = mine.differences(theirs)
    merged = replace(mine, **{one.field: one.theirs for one in found})
    assert merged == theirs
    assert all(one.mine != one.theirs and getattr(mine, one.field) == one.mine for one in found)
    assert mine.differences(mine) == []


def test_a_difference_names_field_and_both_values() -> None:
    (difference,) = SPEC.differences(replace(SPEC, kv_heads=8))
    assert difference == ("kv_heads", 3, 8)
    assert str(difference) == "kv_heads is 3 here and 8 there"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", ""),
        ("weights_digest", ""),
        ("weights_digest", "0" * 63),
        ("rope_digest", "G" * 64),
        ("tokenizer_digest", "0" * 64 + "\n"),
        ("layers", 0),
        ("kv_heads", 0),
        ("head_dim", -1),
        ("vocab_size", 0),
        ("context_length", 1 << 32),
        ("dtype", "float64"),
        ("dtype", ""),
    ],
)
def test_impossible_specs_are_refused(field: str, value: str | int) -> None:
    with pytest.raises(InvalidArgumentError, match=field):
        replace(SPEC, **{field: value})


def test_an_empty_message_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="architecture"):
        ModelSpec.from_proto(kv_pb2.ModelSpec())


def test_a_directory_is_described_as_the_model_loaded_from_it(loaded: LoadedModel) -> None:
    directories = {path.resolve().name: path for path in map(tiny_model, ARCHITECTURES)}
    directory = directories[loaded.name]
    assert loaded.spec.differences(spec_of_directory(directory, loaded.dtype)) == []


def test_the_dtype_is_the_callers(cache: Path) -> None:
    _, directory = find_model(str(tiny_model("llama")))
    one, other = (spec_of_directory(directory, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert [difference.field for difference in one.differences(other)] == ["dtype"]
