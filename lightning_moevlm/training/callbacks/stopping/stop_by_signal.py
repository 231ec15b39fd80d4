"""Ends a run on a signal (Ctrl-C, a preempted node, a closed terminal) at a step from which it can resume.

Python and Lightning would stop in the middle of an optimiser step, or lose the steps since the last checkpoint. Here
the current step is finished first; then Lightning's `SIGTERMException` ends the loops, on all ranks at the same step.
A second signal ends the process at once.
"""

import os
import signal
import threading
from types import FrameType

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

CAUGHT_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Schedulers send the last two before they take a node away."""


class StopBySignal(Callback):
    """Ends training after the current step when a signal arrives.

    Acts only in `fit`. With several ranks a validation is finished first.

    Attributes:
        number: the first signal; 0 is none.
        second: a second one, which ends the process at once; 0 is none.
    """

    def __init__(self) -> None:
        self.number = 0
        self.second = 0
        self._owner = 0  # process id; forked data workers inherit the handlers

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen after Lightning has set its handlers; it restores the earlier ones at the end."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen if there was no sanity check."""
        self._listen()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """End the loops after this step, once its metrics are logged."""
        if trainer.fit_loop._should_accumulate():
            return
        if trainer.world_size > 1:
            number = torch.tensor(float(self.number), device=pl_module.device)
            self.number = int(trainer.strategy.reduce(number, reduce_op="max"))
        self._stop(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: object) -> None:
        """End a validation; its step is validated when the run resumes."""
        if trainer.world_size == 1:
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if self.number and not is_ending(trainer):
            trainer._signal_connector.received_sigterm = True

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._owner = os.getpid()
        for name in CAUGHT_SIGNALS:
            number = getattr(signal, name, None)  # Windows has fewer
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            if number != signal.SIGINT:  # the terminal sends it to workers too, and the last step still needs them
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.number:
            self.second = number
            raise KeyboardInterrupt  # which Lightning answers at once, also on the ranks that it has started
        self.number = number
        name = signal.Signals(number).name
        line = f"\nmoevlm: {name}: stopping after this step; a second signal stops at once, without saving\n"
        os.write(2, line.encode())  # a signal may come in the middle of a print


def is_ending(trainer: Trainer) -> bool:
    """Return whether training ends after this step anyway."""
    return trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step
