"""Registers the connector with vLLM, which calls this in each of its processes (entry point `vllm.general_plugins`).

Nothing heavy is imported here. In particular numba must not be loaded before a worker has scanned all modules for
Triton kernels: llvmlite has an attribute that breaks the scan (vLLM 0.32, `triton_utils/dispatcher.py`).
"""

CONNECTOR = "SpectrumKVConnector"


def register() -> None:
    """Add the connector to vLLM's registry; a second call does nothing."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "spectrumkv.vllm_plugin.connector", CONNECTOR)
