"""The `moevlm` command: training goes to LightningCLI, everything else to typed functions.

Exit codes: 0 success, 1 failure, 2 a user's mistake, 3 a loss that is not finite, 128 + N ended by signal N (130 is
Ctrl-C).
"""

import os
import sys
from collections.abc import Sequence

from rich.console import Console

from lightning_moevlm import __version__
from lightning_moevlm.common.errors import Diverged, Stopped, UserError
from lightning_moevlm.common.process_tuning import collect_rarely, keep_memory, set_thread_defaults
from lightning_moevlm.common.secret_masking import mask_url_secrets

_TRAINING = ("fit", "validate", "test", "predict")
_DIVERGED = 3
_HELP = f"""\
moevlm {__version__}: train sparse mixture-of-experts vision-language models, ablate stabilisers, compare fairly

  moevlm fit -c conf/quickstart.yaml                train one model; validate, test and predict take the same options
  moevlm sweep run ablations/quickstart.yaml        train every arm x seed of a study; run again to resume
  moevlm sweep new FILE                             write a commented study file to start from
  moevlm sweep plan|status|report FILE              show the planned runs, their state, their results
  moevlm sweep matrix ablations/cures               draw which cure undoes which illness, from all studies of a folder
  moevlm compare RUN RUN...                         compare any runs in MLflow; unfair comparisons are refused
  moevlm data build scenes|openmoji                 draw a demo set and write it as WebDataset shards
  moevlm data convert KIND INPUT                    make a set of your own: csv, jsonl, img2dataset, coco_captions,
                                                    karpathy, coco_vqa, gqa, okvqa, textvqa, nlvr2,
                                                    llava, questions, statements
  moevlm data index URLS --out DIR                  list tars where they are, so that reading them is exact
  moevlm data check DIR                             verify a set and print its card
  moevlm data show DIR                              write samples as a page to browse
  moevlm data codebook DIR                          fit a patch codebook, for discrete image targets
  moevlm data answers DIR                           list the answers that a model of questions chooses from
  moevlm export CKPT --out DIR                      write a trained model as safetensors, for plain PyTorch
  moevlm experts RUN                                show which expert serves what, and whether that is more than chance
  moevlm audit PATH                                 a model of Hugging Face: what balances its experts, and their loads
  moevlm spikes RUN                                 explain spikes and crashes: what moved first, the samples, illnesses
  moevlm replay RUN --with KEY=VALUE                train the steps around an event again: what would have prevented it?
  moevlm sync [FOLDER]                              upload logs that runs kept locally while MLflow was unreachable
  moevlm bench layer|dispatch|step|data|adopted     time layers, dispatchers, steps, data and observed models here
  moevlm list [KIND]                                list parts for configurations, designs, metrics
  moevlm describe NAME|study                        explain one part and its options, or the keys of a study file
  moevlm describe -c FILE                           count parameters, FLOPs and activations of a configuration

Every command takes --help. MOEVLM_TRACEBACK=1 shows where an error was raised."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        Console().print(_HELP, highlight=False, markup=False, soft_wrap=True)
        return 0
    if arguments[0] in ("-V", "--version"):
        Console().print(__version__, highlight=False)
        return 0
    if "torch" not in sys.modules:  # it reads the environment once
        set_thread_defaults(os.environ, computes=arguments[0] in (*_TRAINING, "bench", "experts"))
        keep_memory()
    try:
        with collect_rarely():
            return _dispatch(arguments)
    except UserError as error:
        if os.environ.get("MOEVLM_TRACEBACK"):
            raise
        text = mask_url_secrets(str(error))  # some messages repeat the user's input
        # rich takes parts of some paths for an emoji, as in registry:x:1
        Console(stderr=True, emoji=False).print(f"moevlm: error: {text}", highlight=False, markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("moevlm: interrupted", highlight=False)
        return 130
    except (Diverged, Stopped) as ending:
        if str(ending):  # empty on all ranks but the first
            Console(stderr=True).print(f"moevlm: {ending}", highlight=False, markup=False, soft_wrap=True)
        return 128 + ending.signal_number if isinstance(ending, Stopped) else _DIVERGED


def _dispatch(arguments: list[str]) -> int:
    # imports are local: `moevlm data check` need not wait for Lightning
    if arguments[0] in _TRAINING:
        from lightning_moevlm.cli import training

        training.run(arguments)
        return 0
    from lightning_moevlm.cli.run_command import COMMANDS, run_command
    from lightning_moevlm.configuration.messages.parse_errors import explain_unknown_command

    if arguments[0] not in COMMANDS:
        raise UserError(explain_unknown_command(arguments[0], (*_TRAINING, *COMMANDS)))
    return run_command(arguments)


if __name__ == "__main__":
    sys.exit(main())
