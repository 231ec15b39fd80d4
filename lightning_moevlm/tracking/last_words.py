"""What a run says when it ends: where everything is, or how to go on with it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from lightning_moevlm.tracking.links import run_link, server_command, ui_address

_CHECKPOINT = "--ckpt_path"
_RUN_ID = "--trainer.logger.init_args.run_id"


def where_everything_is(uri: str, experiment_id: str, run_id: str, run_dir: Path) -> tuple[str, ...]:
    """Return the lines to print after a run; the second is missing where the store is a server, which runs already."""
    server = server_command(uri)
    return (
        f"Checkpoints and configuration: {run_dir}",
        *(() if server is None else (f"MLflow: {server}",)),
        f"{'MLflow:' if server is None else '       '} {run_link(ui_address(uri), experiment_id, run_id)}",
    )


def command_to_go_on(argv: Sequence[str], checkpoint: Path, run_id: str | None) -> str:
    """Return the command line that continues a run from a checkpoint, in the shell's words.

    Args:
        argv: the command that began it; where it continued a run itself, its options for that are replaced.
        checkpoint: to start from.
        run_id: to go on in; None where no option can name it, and a new run will be made.
    """
    told = {_CHECKPOINT: str(checkpoint)} | ({} if run_id is None else {_RUN_ID: run_id})
    words: list[str] = []
    skip = False
    for word in argv:
        name, equals, _ = word.partition("=")
        if not skip and name not in told:
            words.append(word)
        skip = not skip and name in told and not equals
    return shlex.join([*words, *(word for option in told.items() for word in option)])
