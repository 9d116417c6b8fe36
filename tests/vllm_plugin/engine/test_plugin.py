"""vLLM finds the connector, and finding it loads nothing that breaks vLLM's workers."""

import subprocess
import sys


def test_loading_vllms_plugins_does_not_load_numba() -> None:
    program = (
        "import sys\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory\n"
        "connector = KVConnectorFactory.get_connector_class_by_name('SpectrumKVConnector')\n"
        "print(connector.__name__, *{'numba', 'llvmlite'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["SpectrumKVConnector"], done.stderr[-2000:]
