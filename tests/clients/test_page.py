"""The page at `/` in a real browser, headless, against a real pair."""

import os
import shutil
from pathlib import Path

import pytest

from tests.clients.conftest import Run

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_page_in_chromium(run: Run, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium; on Debian: apt-get install chromium")
    # SCREENSHOTS keeps the pictures, to look at them.
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path)).resolve()
    run("page.py", chromium, str(folder))
    for name in ("light", "dark", "narrow"):
        assert (folder / f"page-{name}.png").read_bytes().startswith(PNG)
