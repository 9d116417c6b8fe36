"""Guards connections by TLS and bearer tokens, and refuses plaintext to other machines unless it is allowed."""

from spectrumkv.common.security.channel_security import ChannelSecurity
from spectrumkv.common.security.server_security import ServerSecurity
from spectrumkv.common.security.tls import SYSTEM_ROOTS, TlsFiles

__all__ = ["SYSTEM_ROOTS", "ChannelSecurity", "ServerSecurity", "TlsFiles"]
