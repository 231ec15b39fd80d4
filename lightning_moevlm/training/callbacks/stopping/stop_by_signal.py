"""Ends a run that is asked to end (Ctrl-C, a preempted node, a closed terminal) where it can be resumed.

Python and Lightning would end it wherever it is: in the middle of an optimiser step, or with the steps since the last
checkpoint lost. A step is finished first; then Lightning's own `SIGTERMException` ends the loops, on all ranks at the
same step. A second signal ends the process at once.
"""

import os
import signal
import threading
from types import FrameType

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

CAUGHT_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""The last two are what schedulers send before they take a node away."""


class StopBySignal(Callback):
    """Ends training after the current step when a signal asks for it; `number` tells which did, 0 is none.

    Acts in `fit` alone. On several ranks a validation is finished first.
    """

    def __init__(self) -> None:
        self.number = 0
        self._owner = 0  # process id; forked data workers inherit the handlers

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen: Lightning has just set its handlers, and restores in the end those from before."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, where there was no sanity check."""
        self._listen()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Have the loops end after this step, once its metrics are logged."""
        if trainer.fit_loop._should_accumulate():
            return
        if trainer.world_size > 1:
            number = torch.tensor(float(self.number), device=pl_module.device)
            self.number = int(trainer.strategy.reduce(number, reduce_op="max"))
        self._stop(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Have a validation end; its step is validated when the run is resumed."""
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
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            if number != signal.SIGINT:  # the terminal sends it to workers too, which the last step still needs
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        name = signal.Signals(number).name
        line = f"\nmoevlm: {name}: stopping after this step; once more stops at once, without saving\n"
        os.write(2, line.encode())  # a signal may come in the middle of a print


def is_ending(trainer: Trainer) -> bool:
    """Tell whether training ends after this step anyway."""
    return trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step
