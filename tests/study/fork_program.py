"""A fork server that imports nothing, so that it is there at once: its runs execute the Python code in their words.

    python -m tests.study.fork_program PIPE

Words `fails` in the first message make it end before it serves.
"""

import sys
from multiprocessing.connection import Connection

from lightning_moevlm.cli.fork_server import leave, serve
from lightning_moevlm.study.run.engines.forks import Channel


def serve_and_run() -> None:
    with Connection(int(sys.argv[1])) as pipe:
        channel = Channel(pipe)
        example = channel.receive()
        if example is not None and example["words"] == ["fails"]:
            sys.exit("it cannot be imported")
        words = serve(channel)
    if words is not None:
        exec(words[0], {"sys": sys})
        leave(0)


if __name__ == "__main__":
    serve_and_run()
