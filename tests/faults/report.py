"""What a run tells whoever watches it: how much was tried, and with which seed."""

import sys

import pytest


def tell(capsys: pytest.CaptureFixture[str], line: str) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\n{line}\n")
        sys.stdout.flush()
