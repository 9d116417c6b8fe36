"""Programs that others made do their work against a real pair; each asserts what it gets."""

import pytest

from tests.clients.conftest import Run


@pytest.mark.parametrize(
    "program", ["openai_sync.py", "openai_async.py", "langchain_chat.py", "litellm_completion.py"]
)
def test_a_client_library(run: Run, program: str) -> None:
    run(program)
