"""How a decode server hears of KV that prefill still computes, so that it is received meanwhile."""

from collections.abc import Mapping
from typing import Any

from spectrumkv.vllm_plugin.proxy.bodies import Body, ClientRequest

# Where a producer hands KV out; it says so in each of its answers, and from the second request on it is known before.
ADDRESS = ("remote_host", "remote_port", "remote_ranks")


class Announcements:
    """Makes the small requests that announce a transfer to a decode server (see `decode.prefetch`)."""

    def __init__(self) -> None:
        self._addresses: dict[str, Body] = {}

    def learn(self, prefill_url: str, transfer: Mapping[str, Any] | None) -> None:
        """Take in where a prefill server hands KV out.

        Args:
            prefill_url: of the server.
            transfer: `kv_transfer_params` of its answer; those of other connectors are left alone.
        """
        if transfer and all(name in transfer for name in ADDRESS):
            self._addresses[prefill_url] = {name: transfer[name] for name in ADDRESS}

    def body(self, prefill_url: str, request: ClientRequest, transfer_id: str) -> Body | None:
        """Return the announcement of a request's transfer.

        Args:
            prefill_url: of the server that computes the prompt.
            request: the client's.
            transfer_id: names the transfer.

        Returns:
            What to send to `/v1/completions` of decode: it ends once the KV was taken over there, and ending it drops
            the KV. None where the prefill server's address is not known yet, or not exactly one request takes the KV.
        """
        address = self._addresses.get(prefill_url)
        if address is None or request.completions > 1 or request.max_tokens == 1:
            return None
        params = {"do_remote_prefill": True, "prefetch": True, "transfer_id": transfer_id} | address
        model = {"model": request.body["model"]} if "model" in request.body else {}
        # The first of two tokens stands for the KV; vLLM computes the other one.
        return model | {"prompt": [1, 1], "max_tokens": 1, "temperature": 0, "kv_transfer_params": params}
