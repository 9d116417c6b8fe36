"""Find out the text of single tokens, which the services name by their ids only."""

from collections.abc import Iterable

from spectrumkv.client.async_client import AsyncSpectrumClient

# Ids in one question to prefill, which takes no more than its context holds.
IDS_AT_ONCE = 256


class TokenTexts:
    """Ask prefill for the text of tokens, and remember it: a vocabulary is small.

    Args:
        client: of the prefill services, which all serve one model.
    """

    def __init__(self, client: AsyncSpectrumClient) -> None:
        self._client = client
        self._known: dict[int, str] = {}

    async def of(self, token_ids: Iterable[int], authorization: str | None) -> dict[int, str]:
        """Return the text of each token.

        Args:
            token_ids: any of the model's.
            authorization: of the caller for whom prefill is asked.

        Returns:
            The texts of all known tokens, these among them.

        Raises:
            SpectrumKVError: prefill cannot be reached, or refuses.
        """
        unknown = sorted(set(token_ids) - self._known.keys())
        for start in range(0, len(unknown), IDS_AT_ONCE):
            asked = unknown[start : start + IDS_AT_ONCE]
            answer = await self._client.detokenize(asked, authorization=authorization)
            self._known.update(zip(asked, answer.token_texts, strict=True))
        return self._known
