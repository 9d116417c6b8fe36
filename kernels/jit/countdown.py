"""A loop that ends the process in time, on a thread that needs no Python."""

from typing import Any

from numba import types

from spectrumkv.kernels.jit.compiled import compiled

# Of the numbers that the two sides share: naps so far, written by the thread that counts; the nap at which the
# process ends, address and length of what to write then, written by whoever sets them.
NAPS, LAST_NAP, ADDRESS, LENGTH = range(4)
# In place of a last nap.
NOT_COUNTED = -1

_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))
_write = types.ExternalFunction("write", types.int64(types.int32, types.uintp, types.uint64))
_raise = types.ExternalFunction("raise", types.int32(types.int32))
_exit = types.ExternalFunction("_exit", types.void(types.int32))


@compiled
def count_naps(shared: Any, nap_microseconds: Any, log: Any, dump_signal: Any, status: Any) -> None:
    """Count naps, and end the process at the last one; this returns only where there is nothing to count.

    Args:
        shared: int64 `[4]`, as described above.
        nap_microseconds: uint32, how long a nap is.
        log: descriptor to write to before the end.
        dump_signal: raised then, whose handler says more.
        status: of the process.
    """
    while shared[LAST_NAP] != NOT_COUNTED:
        _usleep(nap_microseconds)
        shared[NAPS] += 1
        if shared[NAPS] >= shared[LAST_NAP]:
            _write(log, shared[ADDRESS], shared[LENGTH])
            _raise(dump_signal)
            _exit(status)
