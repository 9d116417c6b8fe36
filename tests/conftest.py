import os
import signal

import pytest
import torch
from hypothesis import settings

from tests.schedule import longest_first

# What whoever starts the tests ignores is ignored by all of their children, and tests that send such a signal would
# wait for ever: a shell without job control ignores SIGINT and SIGQUIT in what runs in the background, nohup SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)

# Tests read metrics of their own services over HTTP, for which urllib would ask a proxy even on loopback.
for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
    os.environ.pop(variable, None)

# Triton reads this when it is first imported, and transformers imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shared machine stalls now and then; that is no finding about the code.
settings.register_profile("spectrumkv", deadline=None)
settings.load_profile("spectrumkv")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have each of several processes, which must agree, collect the longest files first."""
    if hasattr(config, "workerinput"):
        longest_first(items)
