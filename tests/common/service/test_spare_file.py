"""A process without a file left closes the connections that it cannot serve, at once and without an error."""

import subprocess
import sys

# Serves with asyncio, lets itself open two files more, connects eight times, lets go of them, and connects once more.
SERVER = """
import asyncio, logging, os, resource, socket, sys
from spectrumkv.common.service.spare_file import SparedListener

logging.basicConfig(format="%(message)s")
outcomes = []

async def greet(reader, writer):
    writer.write(b"hello")
    await reader.read()
    writer.close()

async def ask(client):
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, address)
    try:
        return (await loop.sock_recv(client, 5)) == b"hello"
    except ConnectionResetError:
        return False

async def main():
    async with await asyncio.start_server(greet, sock=listener):
        clients = [socket.socket() for _ in range(9)]
        opened = set(map(int, os.listdir("/proc/self/fd")))
        limit = [one for one in range(100) if one not in opened][1] + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 100))
        print([await ask(client) for client in clients[:8]], flush=True)
        for client in clients[:8]:
            client.close()
        await asyncio.sleep(0.1)
        print(await ask(clients[8]), flush=True)
        # Not what asyncio says of connections that it leaves behind.
        os._exit(0)

listener = SparedListener(socket.create_server(("127.0.0.1", 0)))
address = listener.getsockname()
asyncio.run(main())
"""


def test_callers_are_turned_away_and_later_ones_served() -> None:
    done = subprocess.run([sys.executable, "-c", SERVER], capture_output=True, text=True, timeout=120, check=True)
    served, later = done.stdout.splitlines()
    # Two, and the one with which the directory was listed.
    assert served == str([True] * 3 + [False] * 5)
    assert later == "True"
    assert done.stderr.splitlines() == [
        "no file is left for new connections, which are closed; let this process open more files (ulimit -n)"
    ]
