"""A training as a program, to be killed: python -m tests.tracking.outage_training URI RUN_ID STEPS SECONDS_PER_STEP."""

import os
import sys
import time
from pathlib import Path

from lightning_moevlm.tracking import RunLogger
from tests.tracking.tiny import TinyData, TinyModule, tiny_trainer


class Slow(TinyModule):
    seconds = 0.0

    def on_train_batch_end(self, *_: object) -> None:
        print(f"step {self.global_step}", flush=True)
        logger = self.trainer.logger
        assert isinstance(logger, RunLogger)
        if self.global_step == 6:
            logger.log_tags({"sixth": "seen"})
            logger.log_artifact_text("notes/six.txt", "six")
            Path("six.bin").write_bytes(b"six")
            logger.log_file(Path("six.bin"), "files")
        while self.global_step == int(os.environ["WAITS_AT"]) and not Path("go_on").exists():
            time.sleep(0.05)
        time.sleep(self.seconds)


if __name__ == "__main__":
    uri, run_id, steps, seconds = sys.argv[1:]
    logger = RunLogger(tracking_uri=uri, run_id=run_id, flush_points=1, flush_seconds=0.1)
    Slow.seconds = float(seconds)
    tiny_trainer(logger, Path.cwd(), max_steps=int(steps)).fit(Slow(), TinyData())
