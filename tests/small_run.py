"""The quickstart configuration made smaller still: a training step in milliseconds."""

BACKBONE = "--model.backbone.init_args"

SMALL = (
    "-c",
    "conf/quickstart.yaml",
    "--data.batch_size=8",
    "--data.image_size=32",
    f"{BACKBONE}.dim=16",
    f"{BACKBONE}.num_heads=2",
    f"{BACKBONE}.num_blocks=3",
    f"{BACKBONE}.hidden_dim=32",
    f"{BACKBONE}.patch_size=8",
    f"{BACKBONE}.moe.init_args.num_experts=4",
    f"{BACKBONE}.moe.init_args.experts.init_args.hidden_dim=32",
    "--model.schedule.init_args.warmup=0.2",
    "--trainer.log_every_n_steps=1",
    "--trainer.num_sanity_val_steps=1",
    "--trainer.limit_val_batches=1",
)
"""Options for `moevlm fit`; the caller adds the budget."""


def budget(steps: int, *, total: int | None = None, val_every: int | None = None) -> tuple[str, ...]:
    """Train `steps` steps of a schedule of `total`, validating (and so saving) every `val_every`."""
    return (
        f"--trainer.max_steps={steps}",
        f"--model.schedule.init_args.total_steps={total or steps}",
        f"--trainer.val_check_interval={val_every or steps}",
    )
