"""Follows the requests of a consumer whose KV comes from elsewhere."""

from collections.abc import Iterable, Sequence

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.vllm_plugin.scheduler.params import PrefillElsewhere, prompt_digest
from spectrumkv.vllm_plugin.scheduler.requests import EngineRequest
from spectrumkv.vllm_plugin.scheduler.steps import ConsumerStep, Load, Rejects, TransferRef


class ConsumerSchedule:
    """Follows requests from their arrival to their end, and says what workers fetch, cancel and give up.

    A request waits until pages were allocated for it, then it is loading until the workers report it, and then it is
    forgotten: what it computes afterwards is vLLM's own. A request that ends while it waits gives its transfer up.
    vLLM reports a request that it refused as one that was aborted at once, under an id of its own and with the prompt
    [0]: that prompt does not fit, so the transfer is given up when it arrives.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, PrefillElsewhere] = {}
        self._loading: dict[str, PrefillElsewhere] = {}
        self._loads: list[Load] = []
        self._cancels: list[str] = []
        self._releases: list[TransferRef] = []
        self._prefetches: list[TransferRef] = []
        self._drops: list[str] = []
        self._told = (self._loads, self._cancels, self._releases, self._prefetches, self._drops)
        self.rejects = Rejects()

    def arrived(self, request: EngineRequest) -> str:
        """Take in a request.

        Args:
            request: that vLLM has queued.

        Returns:
            What its prefix cache is salted with; nothing where the KV is exact or its own.
        """
        try:
            found = PrefillElsewhere.of(request.kv_transfer_params)
        except InvalidArgumentError:
            self.rejects.add("params")
            return ""
        if found is None:
            return ""
        if found.prefetch:
            # It computes its own short prompt, and nothing of it waits for the KV.
            self._announced(request.request_id, found)
            return ""
        if not self._fits(request, found):
            self._give_up(request.request_id, found)
            self.rejects.add("prompt")
            return ""
        self._waiting[request.request_id] = found
        return found.salt

    def matched_tokens(self, request: EngineRequest, computed: int) -> int:
        """Tell how many tokens beyond those that are here can be loaded.

        Args:
            request: that vLLM is about to schedule; it may ask more than once.
            computed: tokens whose KV is here already.

        Returns:
            The number of tokens.
        """
        found = self._waiting.get(request.request_id)
        return 0 if found is None else max(0, self._tokens(request, found) - computed)

    def allocated(self, request: EngineRequest, block_ids: Sequence[int], external_tokens: int) -> None:
        """Take in that a request has pages.

        Args:
            request: that vLLM schedules.
            block_ids: its pages, from its first token on.
            external_tokens: how many tokens vLLM expects to be loaded.
        """
        found = self._waiting.pop(request.request_id, None)
        if found is None:
            return
        if external_tokens == 0:
            # All of it is in the prefix cache.
            self._give_up(request.request_id, found)
            return
        tokens = self._tokens(request, found)
        self._loading[request.request_id] = found
        self._loads.append(
            Load(
                request_id=request.request_id,
                transfer_id=found.transfer_id,
                addresses=found.addresses,
                tokens=tokens,
                skip=tokens - external_tokens,
                block_ids=tuple(block_ids),
            )
        )

    def finished(self, request: EngineRequest) -> None:
        """Take in that a request ended, also one that never was scheduled.

        Args:
            request: that ended.
        """
        found = self._waiting.pop(request.request_id, None)
        if found is not None:
            self._give_up(request.request_id, found)
        elif request.request_id in self._loading:
            # The workers report it once they have stopped writing into its pages.
            self._cancels.append(request.request_id)

    def reported(self, request_ids: Iterable[str]) -> None:
        """Take in which loads ended, well or not."""
        for request_id in request_ids:
            self._loading.pop(request_id, None)

    def step(self) -> ConsumerStep:
        """Return what workers do in the next step."""
        loads, cancels, releases, prefetches, drops = self._told
        made = ConsumerStep(tuple(loads), tuple(cancels), tuple(releases), tuple(prefetches), tuple(drops))
        for told in self._told:
            told.clear()
        return made

    @property
    def idle(self) -> bool:
        """Tell whether nothing is waiting, loading or to be told to workers."""
        return not (self._waiting or self._loading or any(self._told))

    def _fits(self, request: EngineRequest, found: PrefillElsewhere) -> bool:
        """Return whether the KV is that of the prompt's first tokens; a proxy may append the first generated one."""
        tokens, ids = self._tokens(request, found), request.prompt_token_ids
        if ids is None or tokens > len(ids):
            return False
        return found.digest is None or prompt_digest(ids[:tokens]) == found.digest

    def _tokens(self, request: EngineRequest, found: PrefillElsewhere) -> int:
        return request.num_prompt_tokens if found.tokens is None else found.tokens

    def _announced(self, request_id: str, found: PrefillElsewhere) -> None:
        if found.prefetch == "drop":
            self._drops.append(found.transfer_id)
        else:
            self._prefetches.append(TransferRef(request_id, found.transfer_id, found.addresses))

    def _give_up(self, request_id: str, found: PrefillElsewhere) -> None:
        self._releases.append(TransferRef(request_id, found.transfer_id, found.addresses))
