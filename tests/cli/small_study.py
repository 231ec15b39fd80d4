"""A study so small that it trains in seconds."""

from collections.abc import Callable

Moevlm = Callable[..., str]
Study = Callable[..., str]

SMALL = {
    "data": {"batch_size": 8, "image_size": 32},
    "model": {
        "backbone": {
            "init_args": {
                "dim": 16,
                "num_heads": 2,
                "num_blocks": 3,
                "hidden_dim": 32,
                "patch_size": 8,
                "moe": {"init_args": {"num_experts": 4, "experts": {"init_args": {"hidden_dim": 32}}}},
            }
        },
        "schedule": {"init_args": {"warmup": 0.5}},
    },
    "trainer": {"val_check_interval": 2, "log_every_n_steps": 1, "num_sanity_val_steps": 1, "limit_val_batches": 1},
}
STUDY = {
    "question": "Does the whole line work?",
    "base": ["conf/quickstart.yaml", "small.yaml"],
    "arms": {"baseline": None, "dense_twin": {"model.backbone.init_args.sparse_modalities": []}},
    "seeds": [0],
    "budget": {"max_steps": 2},
    "primary": {"metric": "val/task_loss"},
}
