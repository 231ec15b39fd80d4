"""What experts are needed for: an observation that no removal confirms is said to be such."""

from lightning_moevlm.atlas.causal.effects import Effect, GroupEffect
from lightning_moevlm.atlas.causal.roles import Expert, Need, Serves, examine_claims, judge, rank_roles
from lightning_moevlm.study.statistics.intervals import Interval

FIRST, SECOND = Expert("blocks.1.ffn", 3), Expert("blocks.1.ffn", 5)


def effect(mean: float, p: float, half: float = 0.01) -> Effect:
    return Effect(42, mean, Interval(mean - half, mean + half, "t"), p, p)


def on(group: str, loss: Effect, more: Effect | None = None) -> GroupEffect:
    return GroupEffect("off", group, loss, None if more is None else effect(0.001, 0.8), more, {})


APPLES = on("category apple", effect(0.3, 1e-6), effect(0.29, 1e-5))
EFFECTS = {
    SECOND: [on("all", effect(0.002, 0.6)), on("category apple", effect(0.003, 0.7), effect(0.001, 0.9))],
    FIRST: [on("all", effect(0.1, 1e-4)), APPLES, on("category dog", effect(0.05, 0.01), effect(-0.02, 0.5))],
}


def test_needs_by_hand() -> None:
    assert judge(APPLES) is Need.SPECIFIC
    assert judge(on("dogs", effect(0.3, 1e-6), effect(0.29, 0.2))) is Need.GENERAL
    assert judge(on("dogs", effect(0.3, 1e-6), effect(-0.29, 1e-6))) is Need.GENERAL
    assert judge(on("all", effect(0.3, 1e-6))) is Need.GENERAL, "there are no others"
    assert judge(on("dogs", effect(-0.3, 1e-6), effect(-0.29, 1e-5))) is Need.NOT_SEEN, "removal helps"
    assert judge(on("dogs", effect(0.3, 0.06))) is Need.NOT_SEEN
    assert judge(None) is Need.NOT_TESTED


def test_experts_are_ranked_by_their_effect_and_name_what_needs_them() -> None:
    roles = rank_roles(EFFECTS, [Serves(FIRST, "category apple", 3.2)], "all")
    assert [role.expert for role in roles] == [FIRST, SECOND]
    assert roles[0].needed_for == (APPLES,) and roles[1].needed_for == ()
    assert roles[0].hurts == () and roles[1].hurts == ()
    assert roles[0].overall is not None and roles[0].overall.mean == 0.1


def test_a_group_that_is_hurt_and_not_served_is_not_said_to_need_the_expert() -> None:
    for observed in ([], [Serves(SECOND, "category apple", 3.2)], [Serves(FIRST, "category dog", 3.2)]):
        first, second = rank_roles(EFFECTS, observed, "all")
        assert first.needed_for == () and first.hurts == (APPLES,) and second.hurts == ()


def test_a_claim_is_reported_beside_its_removal() -> None:
    observed = [
        Serves(FIRST, "category apple", 3.2),
        Serves(SECOND, "category apple", 2.0),
        Serves(FIRST, "category dog", 1.5),
        Serves(SECOND, "category cup", 1.2),
    ]
    claims = examine_claims(observed, EFFECTS)
    assert [claim.need for claim in claims] == [Need.SPECIFIC, Need.NOT_SEEN, Need.GENERAL, Need.NOT_TESTED]
    assert claims[0].sentence == (
        "Expert 3 of blocks.1.ffn serves category apple 3.2 times as often as chance, and they need it. Without it "
        "their loss changes by +0.3 [+0.29, +0.31], p = 1e-06, 42 samples; that of the others changes by +0.001 "
        "[-0.009, +0.011]."
    )
    assert claims[1].sentence == (
        "Expert 5 of blocks.1.ffn serves category apple 2 times as often as chance, but its removal is not seen to "
        "hurt them. Without it their loss changes by +0.003 [-0.007, +0.013], p = 0.7, 42 samples."
    )
    assert "but not shown more than others do" in claims[2].sentence
    assert "was not tested: the probe has fewer than 8 samples" in claims[3].sentence
