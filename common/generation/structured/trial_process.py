"""The helper that `trial` starts: it compiles each form in a fork of itself and says how that went.

This module imports nothing large, and no thread runs when it forks.
"""

import json
import os
import resource
import signal
import sys
import threading
from typing import IO, Any

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.generation.structured.form import StructuredOutput
from spectrumkv.common.generation.structured.grammar import MAX_REASON_CHARACTERS, compiled, reason
from spectrumkv.v1 import generation_pb2

MEMORY_BYTES = 1 << 30
# Tokens that are matched: some limits show there only, and the decode engine must not be the one that meets them.
TRIED_TOKENS = 4
# A length is this many bytes.
LENGTH_BYTES = 4


def main() -> None:
    """Read a tokenizer, and then forms, from standard input; answer each with a sentence, empty where all is well."""
    from llguidance import LLTokenizer

    settings = json.loads(read_block(sys.stdin.buffer) or b"{}")
    if not settings:
        return
    tokenizer = LLTokenizer(
        settings["tokenizer"], n_vocab=settings["vocab_size"], eos_token=settings["eos_token_ids"]
    )
    threading.stack_size(settings["stack_bytes"])
    while (form := read_block(sys.stdin.buffer)) is not None:
        write_block(sys.stdout.buffer, _tried(tokenizer, form, settings["cpu_seconds"]).encode())


def write_block(stream: IO[bytes], block: bytes) -> None:
    """Write bytes with their length before them.

    Args:
        stream: a pipe.
        block: what to write.
    """
    stream.write(len(block).to_bytes(LENGTH_BYTES, "little") + block)
    stream.flush()


def read_block(stream: IO[bytes]) -> bytes | None:
    """Read what `write_block` wrote.

    Args:
        stream: a pipe.

    Returns:
        The bytes; None where the other end is closed.
    """
    length = stream.read(LENGTH_BYTES)
    if len(length) < LENGTH_BYTES:
        return None
    size = int.from_bytes(length, "little")
    block = stream.read(size)
    return block if len(block) == size else None


def _tried(tokenizer: Any, form: bytes, cpu_seconds: float) -> str:
    """Return why a form cannot be used, as a fork of this process finds out."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _try_within_limits(tokenizer, form, cpu_seconds, writing)
        finally:
            # Whatever happened, a fork must not go on to read forms.
            os._exit(1)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return said
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return f"structured_output takes more than {cpu_seconds:g} s of a processor to compile; make it smaller"
    return "structured_output is nested too deeply, or takes too much memory to compile; make it smaller"


def _try_within_limits(tokenizer: Any, form: bytes, cpu_seconds: float, writing: int) -> None:
    """Try a form in this process, write why it cannot be used, and end."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as sizes:
            used = int(sizes.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    said: list[str] = []
    # A thread has the stack that was set; the first thread's grows as the kernel likes.
    thread = threading.Thread(target=lambda: said.append(_try(tokenizer, form)))
    thread.start()
    thread.join()
    os.write(writing, said[0].encode())
    os._exit(0)


def _try(tokenizer: Any, form: bytes) -> str:
    try:
        parsed = StructuredOutput.from_proto(generation_pb2.StructuredOutput.FromString(form))
        matcher = compiled(tokenizer, parsed)
        for _ in range(TRIED_TOKENS):
            allowed = matcher.compute_bitmask()
            if matcher.is_error():
                return f"structured_output.{parsed.form} cannot be held to: {reason(matcher)}"
            first = next((place for place, byte in enumerate(allowed) if byte), None)
            if first is None or matcher.is_stopped():
                break
            lowest = (allowed[first] & -allowed[first]).bit_length() - 1
            matcher.consume_token(8 * first + lowest)
    except InvalidArgumentError as error:
        return error.message
    except BaseException as error:  # noqa: BLE001  # a panic of Rust, too; the sentence is for whoever sent the form
        return f"the form cannot be used: {error}"[:MAX_REASON_CHARACTERS]
    return ""


if __name__ == "__main__":
    main()
