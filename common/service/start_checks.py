"""Finds what is wrong with a service's options before the service loads its model, which takes seconds or minutes."""

import errno
import os

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError
from spectrumkv.common.security import ServerSecurity
from spectrumkv.common.service.config import Address, ServerConfig, flag_name
from spectrumkv.kernels.jit.llvm import converts_float16


def check_start(config: ServerConfig, may_run: bool = False) -> None:
    """Check what both services need besides a model.

    Args:
        config: the service's options.
        may_run: let its addresses be in use, by the same service perhaps.

    Raises:
        FailedPreconditionError: the processor lacks instructions that compiled code needs.
        InvalidArgumentError: the service cannot listen on an address, or cannot use a file of certificates or tokens.
    """
    check_processor()
    ServerSecurity.from_config(config).check()
    for name, address in (("listen", config.listen), ("metrics_listen", config.metrics_listen)):
        _check_address(name, address, may_run)


def check_processor() -> None:
    """Check that the processor can run compiled code, which would otherwise abort the process.

    Raises:
        FailedPreconditionError: the processor lacks instructions that compiled code needs.
    """
    if not converts_float16():
        raise FailedPreconditionError(
            "this processor has no instructions for float16 (F16C), as all of Intel and AMD have since 2013; in a "
            "virtual machine give it the host's processor, with QEMU by -cpu host"
        )


def _check_address(name: str, address: Address, may_be_used: bool) -> None:
    try:
        address.listener().close()
    except OSError as error:
        if may_be_used and error.errno == errno.EADDRINUSE:
            return
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise InvalidArgumentError(
            f"{flag_name(name)} {address} cannot be listened on: {reason}; name another address, or stop what uses it"
        ) from error
