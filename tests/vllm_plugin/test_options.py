"""The connector's options are checked as the services' are."""

import subprocess
import sys
from typing import Any

import pytest

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.vllm_plugin.options import ConnectorOptions


def test_values_come_as_json_has_them() -> None:
    options = ConnectorOptions.of({"budget": 0.25, "outbox_memory": "2GiB", "listen": "10.0.0.1:14600",
                                   "allow_plaintext": True})  # fmt: skip
    assert (options.budget, options.outbox_memory, options.host) == (0.25, 2 << 30, "10.0.0.1")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"budgte": 0.3}, "budgte"),
        ({"budget": 2}, "budget"),
        ({"budget": "a lot"}, "budget"),
        ({"listen": "everywhere"}, "listen"),
        ({"listen": "10.0.0.1:14600"}, "allow_plaintext"),
        ({"listen": "0.0.0.0:14600", "allow_plaintext": True}, "advertise"),
        ({"tls_cert": "a.pem"}, "tls-key"),
        ({"allow_plaintext": "yes"}, "allow-plaintext"),
        ({"fetches": 0}, "fetches"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named) as refused:
        ConnectorOptions.of(given)
    assert refused.value.message.startswith("kv_connector_extra_config: ")


def test_neither_options_nor_state_machines_load_what_breaks_vllm() -> None:
    """A worker must not have loaded numba before it scans all modules for Triton kernels."""
    program = (
        "import sys\n"
        "import spectrumkv.vllm_plugin.register, spectrumkv.vllm_plugin.options\n"
        "import spectrumkv.vllm_plugin.scheduler.producer, spectrumkv.vllm_plugin.scheduler.consumer\n"
        "print(*{'numba', 'llvmlite', 'torch', 'grpc', 'vllm'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
