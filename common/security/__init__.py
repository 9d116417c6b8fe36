"""Who may talk to whom, and unread by others: TLS, bearer tokens, and when neither is needed."""

from spectrumkv.common.security.channel_security import ChannelSecurity
from spectrumkv.common.security.server_security import ServerSecurity
from spectrumkv.common.security.tls import SYSTEM_ROOTS, TlsFiles

__all__ = ["SYSTEM_ROOTS", "ChannelSecurity", "ServerSecurity", "TlsFiles"]
