"""Finds what is wrong with a service's options before the service loads its model, which takes seconds or minutes."""

import os
from contextlib import suppress

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError
from spectrumkv.common.security import ServerSecurity
from spectrumkv.common.service import cgroup
from spectrumkv.common.service.config import Address, ServerConfig, flag_name
from spectrumkv.kernels.jit.llvm import converts_float16


def check_start(config: ServerConfig) -> None:
    """Check what both services need besides a model.

    Args:
        config: the service's options.

    Raises:
        FailedPreconditionError: the processor lacks instructions that compiled code needs.
        InvalidArgumentError: the service cannot listen on an address, or cannot use a file of certificates or tokens.
    """
    check_processor()
    ServerSecurity.from_config(config).check()
    for name, address in (("listen", config.listen), ("metrics_listen", config.metrics_listen)):
        _check_address(name, address)


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


def _check_address(name: str, address: Address) -> None:
    try:
        address.listener().close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise InvalidArgumentError(
            f"{flag_name(name)} {address} cannot be listened on: {reason}; name another address, or stop what uses it"
        ) from error


def memory_bytes() -> int | None:
    """Return the memory that this process may use in bytes: the machine's, or its container's where that is less.

    Returns:
        The bytes; None where the system does not say.
    """
    known = [cgroup.memory_limit()]
    with suppress(AttributeError, ValueError, OSError):
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min((one for one in known if one is not None), default=None)
