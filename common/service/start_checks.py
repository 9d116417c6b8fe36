"""Finds what is wrong with a service's options before the service loads its model, which takes seconds or minutes."""

import errno
import logging
import os

import torch

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError
from spectrumkv.common.security import ServerSecurity
from spectrumkv.common.service import cgroup, machine
from spectrumkv.common.service.config import Address, ServerConfig, flag_name
from spectrumkv.kernels.jit.llvm import converts_float16

logger = logging.getLogger(__name__)


def check_start(config: ServerConfig, may_run: bool = False) -> None:
    """Check what both services need besides a model, and log what they may use of the machine.

    Args:
        config: the service's options.
        may_run: let its addresses be in use, by the same service perhaps.

    Raises:
        FailedPreconditionError: the processor lacks instructions that compiled code needs.
        InvalidArgumentError: more threads are asked for than there are processors for them, the service cannot listen
            on an address, or it cannot use a file of certificates or tokens.
    """
    check_processor()
    _check_threads(config.threads)
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


def _check_threads(threads: int | None) -> None:
    there, memory = machine.processors(), cgroup.memory_bytes()
    if threads is not None and threads > there:
        raise InvalidArgumentError(
            f"--threads is {threads}, and the affinity and the control group of this process let it keep {there} "
            "processors busy; set it lower, or leave it out"
        )
    logger.info(
        "torch runs %d threads; this process may use %d processors and %s of memory",
        torch.get_num_threads(),
        there,
        "an unknown amount" if memory is None else machine.shown_bytes(memory),
    )
