"""A fork server that imports nothing, so that it is there at once: its runs execute the Python code in their words.

    python -m tests.study.fork_program PIPE

Words `fails` in the first message make it end before it serves.
"""

import sys
from multiprocessing.connection import Connection

from lightning_moevlm.cli.fork_server import QuickExit, serve


def serve_and_run() -> None:
    quick_exit = QuickExit()
    with Connection(int(sys.argv[1])) as pipe:
        _, sample, _ = pipe.recv()
        if sample == ["fails"]:
            sys.exit("it cannot be imported")
        words = serve(pipe)
    if words is not None:
        quick_exit.run(lambda: exec(words[0], {"sys": sys}) or 0)


if __name__ == "__main__":
    serve_and_run()
