"""Records with a run what is needed to understand and repeat it.

That is the resolved configuration, its files and command line, its difference from its base, the commit, the versions
and the data. Lightning's own callback saves only the first, needs a directory that its MLflow logger does not have, and
refuses to resume where a config.yaml lies.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from typing_extensions import override

from lightning_moevlm.common.flat_config import find_changes, flatten
from lightning_moevlm.common.secret_masking import mask_argv, mask_yaml
from lightning_moevlm.common.yaml_text import write_yaml
from lightning_moevlm.tracking.record.base_config import Trees, resolve_base, to_masked_trees
from lightning_moevlm.tracking.record.closing_lines import checkpoint_lines, closing_lines
from lightning_moevlm.tracking.record.config_files import config_sources
from lightning_moevlm.tracking.record.config_folder import write_config_folder
from lightning_moevlm.tracking.record.dataset_input import DIGEST_TAG, HasManifest, log_dataset
from lightning_moevlm.tracking.record.foreign_code import foreign_code_tags
from lightning_moevlm.tracking.record.provenance import CODE_TAG, SLURM_JOB_TAG, code_checkout, code_digest, versions
from lightning_moevlm.tracking.record.system_metrics import SystemSampler
from lightning_moevlm.tracking.write.run_logger import RunLogger

_RECORDED = re.compile(r"^source\d+_")  # of a run that is resumed


class RunRecord(SaveConfigCallback):
    """For LightningCLI's `save_config_callback`. Acts on rank 0 only, and not under fast_dev_run or in predict.

    Writes `config/` into the run's directory and its artifacts: `config.yaml` (whole, with its references),
    `changed.yaml` (against the first -c file, or the defaults), `command.txt`, and the -c files as they were,
    `source0_<name>` first. A resumed run gets `config.1/`, and so on; nothing is overwritten. Secrets are masked.

    Args:
        parser: of the subcommand.
        config: its result.
        argv: the command line, with the -c files; None = sys.argv.
        system_metrics: sample CPU, memory, disk, network and GPU during fit.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        argv: Sequence[str] | None = None,
        system_metrics: bool = True,
    ) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self._argv = tuple(sys.argv if argv is None else argv)
        self._system_metrics = system_metrics
        self._sampler: SystemSampler | None = None
        self._log_dir: str | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record once, before the first step."""
        self._log_dir = trainer.log_dir  # a collective call: every rank makes it
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config/`, params, tags and the data's digest; Lightning calls this on rank 0 only."""
        if stage == TrainerFn.PREDICTING:
            return  # nothing will be logged: there would be a run without content
        if not trainer.loggers or isinstance(trainer.loggers[0], DummyLogger):
            return
        trees = to_masked_trees(self.parser, self.config)
        files = self._files(trees)
        logger = _run_logger(trainer)
        if logger is None:
            if self._log_dir is not None:
                write_config_folder(Path(self._log_dir), files, taken=())
            return
        taken = [info.path for info in logger.experiment.list_artifacts(logger.run_id)]
        folder = write_config_folder(logger.run_dir, files, taken)
        logger.log_directory(folder, folder.name)
        logger.log_hyperparams(trees.resolved)
        logger.log_tags(self._tags() | foreign_code_tags(trees.resolved))
        _log_dataset(logger, trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to sample the machine."""
        logger = _run_logger(trainer)
        if logger is None or not self._system_metrics or not trainer.is_global_zero:
            return
        start_ms = logger.experiment.get_run(logger.run_id).info.start_time
        self._sampler = SystemSampler(logger.log_metrics, start_ms)
        self._sampler.start()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where a resumed run goes on; drop what an earlier attempt logged beyond its checkpoint."""
        if trainer.ckpt_path is None:
            return
        end = f" of {trainer.max_steps}" if trainer.max_steps > 0 else ""
        rank_zero_info(f"resumes after step {trainer.global_step}{end}")
        logger = _run_logger(trainer)
        if logger is not None:
            logger.rewind(trainer.global_step)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print where checkpoints, configuration and MLflow are."""
        logger = _run_logger(trainer)
        if not trainer.is_global_zero:
            return
        if logger is None:
            lines = checkpoint_lines(trainer)
        else:
            assert logger.experiment_id is not None and logger.run_id is not None
            lines = closing_lines(logger.tracking_uri, logger.experiment_id, logger.run_id, logger.run_dir)
        for line in lines:
            Console().print(line, soft_wrap=True, highlight=False, markup=False)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop sampling before the logger closes the run."""
        self._stop_sampling()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop sampling."""
        self._stop_sampling()

    def _stop_sampling(self) -> None:
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler = None

    def _files(self, trees: Trees) -> dict[str, str]:
        sources = config_sources(self._argv)
        files = {
            "config.yaml": write_yaml(trees.written),
            "changed.yaml": self._changed(sources, trees.resolved),
            "command.txt": shlex.join(mask_argv(self._argv, os.environ)) + "\n",
        }
        for index, path in enumerate(sources):
            name = f"source{index}_{_RECORDED.sub('', path.name)}"
            files[name] = mask_yaml(path.read_text(encoding="utf-8"), os.environ)
        return files

    def _changed(self, sources: Sequence[Path], resolved: Mapping[str, object]) -> str:
        """Return every key that the later files and the command line changed, with both values."""
        base, text = resolve_base(self.parser, sources)
        different = find_changes(flatten(base), flatten(resolved))
        rows = {key: {"base": change.base, "now": change.now} for key, change in different.items()}
        return f"# {text}\n" + write_yaml(rows)

    @staticmethod
    def _tags() -> dict[str, str]:
        tags = {f"version/{name}": number for name, number in versions().items()} | {CODE_TAG: code_digest()}
        checkout = code_checkout()
        if checkout is not None:
            tags |= {"commit": checkout.commit, "commit_dirty": str(checkout.dirty).lower()}
        job = os.environ.get("SLURM_JOB_ID")
        return tags | ({SLURM_JOB_TAG: job} if job else {})


def _run_logger(trainer: Trainer) -> RunLogger | None:
    """Return the first RunLogger; under fast_dev_run Lightning has replaced it."""
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)


def _log_dataset(logger: RunLogger, trainer: Trainer) -> None:
    data: Any = getattr(trainer, "datamodule", None)
    if isinstance(data, HasManifest):
        assert logger.run_id is not None
        log_dataset(logger.experiment, logger.run_id, data)
        logger.log_tags({DIGEST_TAG: data.manifest_digest})
