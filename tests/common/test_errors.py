"""What an error quotes of a caller's values."""

import pytest

from spectrumkv.common.errors import quoted


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "''"),
        ("a\n", r"'a\n'"),
        ("x" * 100, repr("x" * 100)),
        ("x" * 101, f"'{'x' * 100}'… (101 characters)"),
        ("x" * 100_000, f"'{'x' * 100}'… (100,000 characters)"),
        (3.5, "3.5"),
        (None, "None"),
        (["x" * 98], f"['{'x' * 98}… (102 characters)"),
    ],
)
def test_a_long_value_is_quoted_by_its_beginning_and_its_length(value: object, said: str) -> None:
    assert quoted(value) == said
