"""Whether runs may be compared: what must be the same, what is a warning, what a study file may ask for."""

import dataclasses

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.study.compare.fairness import Subject, Weight, find_differences, refuse_biased


def subject(arm: str, seed: int = 0, **config: object) -> Subject:
    data = {"root": "shards", "batch_size": 8, "seed": seed, "shuffle_buffer": 100}
    model = {"schedule": {"init_args": {"total_steps": 40}}, "precision": {"router": "float32"}}
    trainer = {"max_steps": 40, "accumulate_grad_batches": 1, "precision": "32-true", "accelerator": "auto"}
    trainer |= {"limit_val_batches": None}
    tags = {
        "commit": "a" * 40,
        "commit_dirty": "false",
        "manifest_digest": "5" * 64,
        "version/torch": "2.13.0",
        "dispatch/ffn.text": "GroupedDispatcher for 8 experts",
        "router_dtype": "float32",
    }
    return Subject(arm, seed, {}, {"data": data, "model": model, "trainer": trainer, **config}, tags, 40)


def tagged(one: Subject, **tags: str) -> Subject:
    return dataclasses.replace(one, tags={**one.tags, **{key.replace("__", "/"): text for key, text in tags.items()}})


def configured(one: Subject, part: str, **values: object) -> Subject:
    return dataclasses.replace(one, resolved={**one.resolved, part: {**one.resolved[part], **values}})


def test_a_resume_may_change_what_nothing_is_learnt_from():
    moved = {"changed_param__trainer.logger.init_args.run_id": "1f", "changed_param__ckpt_path": "last.ckpt"}
    other = tagged(subject("b"), **moved, **{"changed_param__data.cache_dir": "elsewhere"})
    assert find_differences([subject("a"), other]) == ()
    both = [tagged(subject(arm), **{"changed_param__trainer.max_steps": "80"}) for arm in ("a", "b")]
    assert find_differences(both) == ()


def test_all_batches_are_all_however_they_are_written():
    assert find_differences([subject("a"), configured(subject("b"), "trainer", limit_val_batches=1.0)]) == ()


def test_other_compute_is_listed_and_not_called_alike():
    base, more = (
        dataclasses.replace(subject(arm), compute=told) for arm, told in (("a", "19 M"), ("b", "+14.2 % of 19 M"))
    )
    [found] = find_differences([base, more])
    assert (found.name, found.weight) == ("active FLOPs of a sample", Weight.WARNS)
    wide = dataclasses.replace(more, changes={"model.backbone.init_args.hidden_dim": 512})
    [found] = find_differences([base, wide])
    assert (found.weight, found.text) == (Weight.DECLARED, "19 M (a); +14.2 % of 19 M (b)")
    assert find_differences([base, dataclasses.replace(base, arm="b")]) == ()


def test_equal_runs_differ_in_nothing():
    assert find_differences([subject(arm, seed) for arm in ("a", "b") for seed in (0, 1)]) == ()
    assert find_differences([]) == ()


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (dataclasses.replace(subject("b"), steps=30), "steps made"),
        (configured(subject("b"), "data", batch_size=16), "samples per step"),
        (configured(subject("b"), "trainer", accumulate_grad_batches=2), "samples per step"),
        (
            configured(configured(subject("b"), "data", batch_size=4), "trainer", accumulate_grad_batches=2),
            "samples per step",
        ),
        (configured(subject("b"), "data", shuffle_buffer=1), "data order shuffle_buffer"),
        (configured(subject("b"), "data", seed=7), "data order seed of seed 0"),
        (configured(subject("b"), "trainer", max_steps=20), "schedule"),
        (tagged(subject("b"), manifest_digest="6" * 64), "data manifest"),
        (configured(subject("b"), "trainer", limit_val_batches=1), "validation samples"),
        (configured(subject("b"), "trainer", limit_val_batches=0.5), "validation samples"),
        (configured(subject("b"), "trainer", num_sanity_val_steps=2), "validation samples of the untrained model"),
        (tagged(subject("b"), **{"changed_param__model.optimizer.init_args.lr": "0.1"}), "changed by a resume"),
        (tagged(subject("b"), **{"changed_param__trainer.max_steps": "80"}), "changed by a resume"),
    ],
)
def test_a_bias_is_refused_and_named(other: Subject, name: str):
    [found] = find_differences([subject("a"), other])
    assert (found.name, found.weight) == (name, Weight.BIASES)
    with pytest.raises(UserError, match=rf"they differ in {name}: .*\(a\); .*\(b\).*--unfair=true"):
        refuse_biased("study", [found], "Run them again, or --unfair=true")


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (tagged(subject("b"), commit="b" * 40), "code commit"),
        (tagged(subject("b"), commit_dirty="true"), "code commit"),
        (tagged(subject("b"), **{"dispatch/ffn.image": "LoopDispatcher for 8 experts"}), None),
        (tagged(subject("b"), **{"dispatch/ffn.text": "LoopDispatcher for 8 experts"}), "kernel path ffn.text"),
        (tagged(subject("b"), router_dtype="bfloat16"), "dtype of routers"),
        (tagged(subject("b"), version__torch="2.14.0"), "version of torch"),
        (configured(subject("b"), "trainer", precision="bf16-mixed"), "dtype trainer.precision"),
        (configured(subject("b"), "trainer", accelerator="gpu"), "device accelerator"),
    ],
)
def test_a_warning_is_not_refused(other: Subject, name: str | None):
    found = find_differences([subject("a"), other])
    # A layer that the other arm does not have is no difference of kernels.
    assert [(one.name, one.weight) for one in found] == ([] if name is None else [(name, Weight.WARNS)])
    refuse_biased("study", found, "Run them again, or --unfair=true")


def test_a_declared_difference_is_listed_and_not_refused():
    other = dataclasses.replace(configured(subject("b"), "data", batch_size=16), changes={"data.batch_size": 16})
    [found] = find_differences([subject("a"), other])
    assert (found.name, found.weight) == ("samples per step", Weight.DECLARED)
    refuse_biased("study", [found], "Run them again, or --unfair=true")
    # A third arm that differs without saying so is refused all the same.
    silent = configured(subject("c"), "data", batch_size=4)
    [found] = find_differences([subject("a"), other, silent])
    assert found.weight is Weight.BIASES
    assert found.values == {"8": ("a",), "4": ("c",)}


def test_runs_are_named_if_not_all_of_an_arm_differ():
    runs = [subject("a", 0), tagged(subject("a", 1), commit="b" * 40), subject("b", 0)]
    [found] = find_differences(runs)
    assert found.text == "aaaaaaaaaaaa (a-seed0, b); bbbbbbbbbbbb (a-seed1)"


def test_a_run_that_diverged_may_have_ended_early():
    assert find_differences([subject("a"), dataclasses.replace(subject("b"), steps=None)]) == ()


def test_biases_come_first():
    other = tagged(dataclasses.replace(subject("b"), steps=30), commit="b" * 40)
    assert [one.weight for one in find_differences([subject("a"), other])] == [Weight.BIASES, Weight.WARNS]
