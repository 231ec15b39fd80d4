"""What is particular to each router, by hand."""

from typing import Literal

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan
from lightning_moevlm.model.layers import initialise
from lightning_moevlm.model.routers import (
    CosineRouter,
    ExpertChoiceRouter,
    FixedRouter,
    Gate,
    GroupLimit,
    GroupLimitedRouter,
    GShardRouter,
    HashRouter,
    LongTailRouter,
    ModalityRouter,
    NoisyTopKRouter,
    ReLURouter,
    Router,
    SequenceTopKRouter,
    SigmoidBiasRouter,
    SinkhornRouter,
    SoftRouter,
    TopKRouter,
    TopPRouter,
)
from lightning_moevlm.model.routers.learned.sinkhorn import balance_log_plan
from tests.routing import routing_input

LN = torch.tensor([[1.0, 2.0, 5.0]]).log()  # softmax: 1/8, 2/8, 5/8


def identity(router: Router) -> Router:
    """Make the logits equal to the tokens."""
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(*router.weight_ED.shape))
    return router.eval()


def route(router: Router, tokens_TD: torch.Tensor) -> PairPlan:
    return router(routing_input(*tokens_TD.shape)._replace(tokens_TD=tokens_TD))


def test_top_2() -> None:
    plan = route(identity(TopKRouter(3, 3, top_k=2)), LN)
    assert plan.expert_N.tolist() == [2, 1]
    torch.testing.assert_close(plan.weight_N, torch.tensor([5 / 8, 2 / 8]))
    renormalised = route(identity(TopKRouter(3, 3, top_k=2, renormalise=True)), LN)
    torch.testing.assert_close(renormalised.weight_N, torch.tensor([5 / 7, 2 / 7]))


def test_temperature_divides_the_logits() -> None:
    plan = route(identity(TopKRouter(3, 3, gate=Gate(temperature=0.5))), LN)  # squares: 1, 4, 25
    torch.testing.assert_close(plan.probs_TE, torch.tensor([[1 / 30, 4 / 30, 25 / 30]]))


def test_jitter_and_dropout_act_in_training_alone() -> None:
    for gate in (Gate(jitter=0.1), Gate(dropout=0.5)):
        router = TopKRouter(16, 4, gate=gate)
        initialise(router, seed=0, std=0.5)
        inputs = routing_input(10, 16)
        assert not torch.equal(router.train()(inputs).logits_TE, router(inputs).logits_TE)
        assert torch.equal(router.eval()(inputs).logits_TE, router(inputs).logits_TE)
    jittered = Gate(jitter=0.1).inputs(torch.ones(1000), training=True)
    assert 0.9 <= float(jittered.min()) < 0.91 and 1.09 < float(jittered.max()) <= 1.1


def test_initial_scale_of_a_router_is_its_own() -> None:
    undecided, plain = TopKRouter(16, 4, gate=Gate(initial_std=0.0)), TopKRouter(16, 4)
    for router in (undecided, plain):
        initialise(router, seed=0, std=0.5)
    assert torch.equal(undecided.weight_ED, torch.zeros(4, 16))
    assert float(plain.weight_ED.detach().std()) > 0.2


def test_noise_has_the_scale_of_v_moe_and_only_in_training() -> None:
    router = identity(NoisyTopKRouter(4, 4, top_k=1, noise_scale=2.0))
    tokens_TD = torch.zeros(20_000, 4)
    plan = route(router.train(), tokens_TD)
    assert torch.equal(plan.logits_TE, tokens_TD)  # the plan keeps them without noise
    noisy_TE = plan.probs_TE.log() - plan.probs_TE.log().mean(dim=-1, keepdim=True)
    # sigma 2 / E = 0.5; removing the mean of four leaves sqrt(3/4) of it
    assert float(noisy_TE.detach().std()) == pytest.approx(0.5 * (3 / 4) ** 0.5, rel=0.02)
    assert torch.equal(route(router.eval(), tokens_TD).probs_TE, torch.full((20_000, 4), 0.25))


def test_noisy_weights_of_shazeer_are_a_softmax_over_the_chosen() -> None:
    # of 1/8, 2/8 and 5/8 the two largest: as they are (V-MoE), or divided by 7/8
    plain = route(identity(NoisyTopKRouter(3, 3)), LN)
    shazeer = route(identity(NoisyTopKRouter(3, 3, learned_noise=True, renormalise=True)), LN)
    torch.testing.assert_close(plain.weight_N, torch.tensor([5 / 8, 2 / 8]))
    torch.testing.assert_close(shazeer.weight_N, torch.tensor([5 / 7, 2 / 7]))


def test_second_expert_of_gshard_is_used_as_often_as_its_weight_says() -> None:
    # softmax of (ln 3, 0): 3/4 and 1/4; with threshold 0.5 the second is used with probability 1/2
    router = identity(GShardRouter(2, 2))
    tokens_TD = torch.tensor([[3.0, 1.0]]).log().expand(20_000, 2)
    second_N = route(router.train(), tokens_TD).chosen_N[20_000:]
    assert float(second_N.float().mean()) == pytest.approx(0.5, abs=0.02)
    assert bool(route(router.eval(), tokens_TD).chosen_N.all())
    # of 1/8, 2/8 and 5/8 the weights of the two largest are 5/7 and 2/7, whether or not the second one is used: with
    # probability 2/7 over 1/2
    three = route(identity(GShardRouter(3, 3)).train(), LN.expand(20_000, 3))
    torch.testing.assert_close(three.weight_N[[0, 20_000]], torch.tensor([5 / 7, 2 / 7]))
    assert float(three.chosen_N[20_000:].float().mean()) == pytest.approx(4 / 7, abs=0.02)


def test_bias_steers_the_choice_and_not_the_weight() -> None:
    router = identity(SigmoidBiasRouter(3, 3, top_k=1))
    tokens_TD = torch.tensor([[0.0, 1.0, -1.0]])
    before = route(router, tokens_TD)
    router.bias_AE.copy_(torch.tensor([[0.9, 0.0, 0.0]]))
    after = route(router, tokens_TD)
    assert before.expert_N.tolist() == [1] and after.expert_N.tolist() == [0]
    torch.testing.assert_close(after.weight_N, torch.tensor([0.5]))  # sigmoid(0), without the bias


def test_sigmoid_weights_by_hand() -> None:
    # sigmoid of ln 3, 0 and -ln 3: 3/4, 2/4, 1/4; the two largest are as they are, or divided by 5/4; all by 6/4
    tokens_TD = torch.tensor([[3.0, 1.0, 1 / 3]]).log()
    plain = route(identity(SigmoidBiasRouter(3, 3, renormalise=False)), tokens_TD)
    divided = route(identity(SigmoidBiasRouter(3, 3)), tokens_TD)
    torch.testing.assert_close(plain.weight_N, torch.tensor([3 / 4, 2 / 4]))
    torch.testing.assert_close(divided.weight_N, torch.tensor([3 / 5, 2 / 5]))
    for plan in (plain, divided):
        torch.testing.assert_close(plan.probs_TE, torch.tensor([[3 / 6, 2 / 6, 1 / 6]]))


def test_other_scores_by_hand() -> None:
    # softplus of ln(e^a - 1) is a: square roots of 1, 4 and 9 are 1, 2, 3
    roots = route(
        identity(SigmoidBiasRouter(3, 3, score="sqrt_softplus")), torch.tensor([[1.0, 4.0, 9.0]]).expm1().log()
    )
    assert roots.expert_N.tolist() == [2, 1]
    torch.testing.assert_close(roots.weight_N, torch.tensor([3 / 5, 2 / 5]))
    torch.testing.assert_close(roots.probs_TE, torch.tensor([[1 / 6, 2 / 6, 3 / 6]]))
    softmax = route(identity(SigmoidBiasRouter(3, 3, score="softmax")), LN)
    torch.testing.assert_close(softmax.weight_N, torch.tensor([5 / 7, 2 / 7]))
    torch.testing.assert_close(softmax.probs_TE, torch.tensor([[1 / 8, 2 / 8, 5 / 8]]))


def test_weights_may_have_a_score_of_their_own() -> None:
    # sigmoid: 1/2, 2/3, 5/6, so with a bias of 1 on expert 0 it chooses 0 and 2; softmax weighs them 1 : 5
    router = identity(SigmoidBiasRouter(3, 3, weight_score="softmax"))
    router.bias_AE.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
    plan = route(router, LN)
    assert plan.expert_N.tolist() == [0, 2]
    torch.testing.assert_close(plan.weight_N, torch.tensor([1 / 6, 5 / 6]))
    torch.testing.assert_close(plan.probs_TE, torch.tensor([[1 / 4, 2 / 6, 5 / 12]]))


@pytest.mark.parametrize("score", ["softmax", "sqrt_softplus", None])
def test_scores_have_finite_gradients_far_out(score: Literal["softmax", "sqrt_softplus"] | None) -> None:
    tokens_TD = torch.tensor([[-300.0, 0.0, 300.0]]).requires_grad_()
    route(identity(SigmoidBiasRouter(3, 3, top_k=3, score=score)), tokens_TD).weight_N[0].backward()
    assert tokens_TD.grad is not None and bool(tokens_TD.grad.isfinite().all())


def test_groups_by_hand() -> None:
    # two groups of two: p = (5, 1 | 3, 4) / 13. By the sum of both: 6 against 7, so the second group; its order is 3, 2
    tokens_TD = torch.tensor([[5.0, 1.0, 3.0, 4.0]]).log()
    by_both, by_largest = (identity(GroupLimitedRouter(4, 4, groups=GroupLimit(2, 1, number))) for number in (2, 1))
    assert route(by_both, tokens_TD).expert_N.tolist() == [3, 2]
    # by the largest alone: 5 against 4, so the first group
    assert route(by_largest, tokens_TD).expert_N.tolist() == [0, 1]


def test_groups_of_biased_scores_by_hand() -> None:
    # s = (3/4, 1/4 | 2/4, 3/5): sums 1 and 1.1, so the second group, in the order 3, 2; weights 6/11 and 5/11.
    # with a bias of 1/5 on expert 1 the sums are 1.2 and 1.1: experts 0 and 1, by s + b, weighed by s: 3/4 and 1/4.
    # a bias of -2 on all changes nothing: scores below 0 are chosen before experts of other groups
    tokens_TD = torch.tensor([[3.0, 1 / 3, 1.0, 3 / 2]]).log()
    router = identity(SigmoidBiasRouter(4, 4, groups=GroupLimit(2, 1)))
    for bias, expected, weights in (
        ([0.0, 0.0, 0.0, 0.0], [3, 2], [6 / 11, 5 / 11]),
        ([0.0, 0.2, 0.0, 0.0], [0, 1], [3 / 4, 1 / 4]),
        ([-2.0, -2.0, -2.0, -2.0], [3, 2], [6 / 11, 5 / 11]),
    ):
        router.bias_AE.copy_(torch.tensor([bias]))
        plan = route(router, tokens_TD)
        assert plan.expert_N.tolist() == expected
        torch.testing.assert_close(plan.weight_N, torch.tensor(weights))


def test_top_p_takes_as_many_as_it_needs() -> None:
    # 5/8 reaches 0.6 alone; 0.7 needs 5/8 + 2/8; 0.9 needs all three
    for threshold, expected in ((0.6, 1), (0.7, 2), (0.9, 3)):
        plan = route(identity(TopPRouter(3, 3, threshold=threshold, max_k=3)), LN)
        assert int(plan.chosen_N.sum()) == expected


def test_cosine_is_blind_to_length() -> None:
    router = CosineRouter(16, 8)
    initialise(router, seed=0, std=0.5)
    inputs = routing_input(10, 16)
    scaled = router(inputs._replace(tokens_TD=inputs.tokens_TD * 100))
    torch.testing.assert_close(scaled.logits_TE, router(inputs).logits_TE, rtol=1e-4, atol=1e-4)
    assert float(scaled.logits_TE.detach().abs().max()) <= 1 / 0.07 + 1e-4


def test_cosine_learns_its_temperature_or_keeps_it() -> None:
    # along the first of two rows, at tau 0.07: 1 / 0.07 and 0; a learned factor of 3 makes it 3 / 0.07
    learned, fixed = CosineRouter(2, 2, routing_dim=2), CosineRouter(2, 2, routing_dim=2, learn_temperature=False)
    for router in (learned, fixed):
        initialise(router, seed=0)
        with torch.no_grad():
            router.project_weight.copy_(torch.eye(2))
            router.expert_weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 0.2]]))  # rows' lengths do not matter either
        torch.testing.assert_close(route(router, torch.tensor([[4.0, 0]])).logits_TE, torch.tensor([[1 / 0.07, 0]]))
    assert fixed.scale is None and learned.scale is not None
    learned.scale.data.fill_(3.0)
    torch.testing.assert_close(route(learned, torch.tensor([[4.0, 0]])).logits_TE, torch.tensor([[3 / 0.07, 0]]))


def test_sinkhorn_balances_columns_and_rows() -> None:
    logits_TE = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) * 3
    valid_T = torch.arange(64) < 60
    plan_TE = balance_log_plan(logits_TE, valid_T, 50).exp()
    torch.testing.assert_close(plan_TE.sum(dim=0), torch.full((4,), 15.0))
    torch.testing.assert_close(plan_TE[:60].sum(dim=1), torch.ones(60), rtol=1e-2, atol=1e-2)
    assert torch.equal(plan_TE[60:], torch.zeros(4, 4))


@pytest.mark.parametrize("training", [True, False])
def test_sinkhorn_weights_are_of_the_logits(training: bool) -> None:
    # one choice weighs sigmoid(ln 5) = 5/6, several their softmax; the plan that chose them has no part in it
    one, two = (route(identity(SinkhornRouter(3, 3, top_k=k)).train(training), LN.expand(2, 3)) for k in (1, 2))
    weights_E = torch.tensor([1 / 2, 2 / 3, 5 / 6])
    torch.testing.assert_close(one.weight_N, weights_E[one.expert_N])
    torch.testing.assert_close(two.weight_N, torch.tensor([1 / 8, 2 / 8, 5 / 8])[two.expert_N])
    if not training:
        assert one.expert_N.tolist() == [2, 2] and two.expert_N.tolist() == [2, 2, 1, 1]


def test_sinkhorn_routes_evenly_in_training_and_greedily_in_evaluation() -> None:
    router = SinkhornRouter(16, 8)
    initialise(router, seed=0, std=0.5)
    inputs = routing_input(512, 16)
    inputs = inputs._replace(tokens_TD=inputs.tokens_TD + 1.0)

    def violation() -> float:
        load_E = torch.bincount(router(inputs).expert_N, minlength=8).float()
        return float(load_E.max() / load_E.mean() - 1)

    assert violation() < 0.3
    router.eval()
    assert violation() > 1.0


def test_expert_choice_gives_every_expert_the_same_load() -> None:
    router = ExpertChoiceRouter(16, 8, capacity_factor=2.0)
    initialise(router, seed=0, std=0.5)
    plan = router(routing_input(40, 16, num_padding=8))
    load_E = torch.bincount(plan.expert_N[plan.chosen_N], minlength=8)
    assert load_E.tolist() == [8] * 8  # ceil(2 * 32 / 8)
    few = ExpertChoiceRouter(16, 5, capacity_factor=1.1)
    initialise(few, seed=0, std=0.5)
    plan = few(routing_input(60, 16, num_padding=10))
    load_E = torch.bincount(plan.expert_N[plan.chosen_N], minlength=5)
    assert load_E.tolist() == [11] * 5  # 1.1 * 50 / 5, which is a little above 11 in fp64


def test_sigmoid_scores_of_an_expert_ignore_the_others() -> None:
    # logits are the tokens: expert 0 likes tokens 0 and 2, expert 1 tokens 1 and 2; a softmax would rank 3 before 2
    tokens = torch.tensor([[2.0, 0.0], [-1.0, 3.0], [1.0, 1.0], [0.0, -4.0]])
    plan = route(identity(ExpertChoiceRouter(2, 2, score="sigmoid")), tokens)
    assert plan.expert_N.tolist() == [0, 1, 0, 1] and plan.token_N.tolist() == [0, 1, 2, 2]
    torch.testing.assert_close(plan.weight_N, torch.tensor([2.0, 3.0, 1.0, 1.0]).sigmoid())
    torch.testing.assert_close(plan.probs_TE.sum(dim=-1), torch.ones(4))
    assert route(identity(ExpertChoiceRouter(2, 2)), tokens).token_N.tolist() == [3, 1, 0, 2]


def test_a_sequence_spends_its_budget_on_its_best_pairs() -> None:
    # two samples of two tokens, one expert each on average. The first token's two best, 0.5 and 0.45, beat the second's
    # 0.4; in the other sample 0.9 and 0.6 are of different tokens. With one expert at most, each token takes its best
    probs_TE = torch.tensor([[0.5, 0.45, 0.05], [0.4, 0.35, 0.25], [0.9, 0.05, 0.05], [0.1, 0.3, 0.6]])
    inputs = routing_input(4, 3)._replace(tokens_TD=probs_TE.log(), num_sequences=2)
    plan, capped = (identity(SequenceTopKRouter(3, 3, top_k=1, max_k=most))(inputs) for most in (None, 1))
    assert [*zip(plan.token_N[plan.chosen_N].tolist(), plan.expert_N[plan.chosen_N].tolist(), strict=True)] == [
        (0, 0), (2, 0), (3, 2), (0, 1)
    ]  # fmt: skip
    torch.testing.assert_close(plan.weight_N[plan.chosen_N], torch.tensor([0.5, 0.9, 0.6, 0.45]))
    assert capped.chosen_N.all() and capped.expert_N.tolist() == [0, 0, 0, 2]
    # padding spends nothing: one token left has a budget of one
    padded = identity(SequenceTopKRouter(3, 3, top_k=1))(
        inputs._replace(valid_T=torch.tensor([True, False, True, True]))
    )
    assert sorted(padded.token_N[padded.chosen_N].tolist()) == [0, 2, 3]


def test_renormalised_weights_of_a_sequence_sum_to_one_where_there_are_any() -> None:
    # of the four largest, the first token has 0.5, 0.45 and the second 0.4, 0.35; the next, 0.25, is over the budget
    probs_TE = torch.tensor([[0.5, 0.45, 0.05], [0.4, 0.35, 0.25]])
    inputs = routing_input(2, 3)._replace(tokens_TD=probs_TE.log())
    plan = identity(SequenceTopKRouter(3, 3, renormalise=True))(inputs)
    torch.testing.assert_close(plan.weight_N[plan.chosen_N], torch.tensor([50 / 95, 40 / 75, 45 / 95, 35 / 75]))


def test_patches_of_the_tail_get_more_experts() -> None:
    # variances 0.109, 0.002, 0.002 of three patches, mean 0.038: the first is of the tail. The text varies more, and is
    # no patch; the fifth token is padding
    sharp, flat = [0.8, 0.1, 0.1], [0.4, 0.35, 0.25]
    probs_TE = torch.tensor([sharp, flat, flat, [0.9, 0.06, 0.04], [0.98, 0.01, 0.01]])
    inputs = routing_input(5, 3, num_padding=1)._replace(
        tokens_TD=probs_TE.log(), modality_T=torch.tensor([0, 0, 0, 1, 0])
    )
    plan = identity(LongTailRouter(3, 3, top_k=2, tail_k=3))(inputs)
    assert plan.chosen_N.view(3, 5).sum(dim=0).tolist() == [3, 2, 2, 2, 0]
    weight_TK = plan.weight_N.view(3, 5).t()
    torch.testing.assert_close(weight_TK[0], torch.tensor(sharp).softmax(dim=0))
    torch.testing.assert_close(
        weight_TK[1], torch.tensor([0.4, 0.35]).softmax(dim=0).new_tensor([0.5125, 0.4875, 0.0]), rtol=0, atol=1e-4
    )
    assert not LongTailRouter(4, 4).competes  # a text's experts follow from its own token


def test_relu_uses_positive_scores_alone() -> None:
    plan = route(identity(ReLURouter(3, 3)), torch.tensor([[1.0, -2.0, 0.5]]))
    assert plan.expert_N[plan.chosen_N].tolist() == [0, 2]
    assert plan.weight_N[plan.chosen_N].tolist() == [1.0, 0.5]


def test_controls() -> None:
    inputs = routing_input(64, 16)
    balanced = FixedRouter(16, 8, "balanced")(inputs)
    assert torch.bincount(balanced.expert_N, minlength=8).tolist() == [8] * 8
    by_modality = ModalityRouter(16, 8)(inputs)
    assert torch.equal(by_modality.expert_N % 2, inputs.modality_T)
    assert int(Modality.IMAGE) == 0
    assert torch.bincount(by_modality.expert_N, minlength=8).tolist() == [8] * 8  # each modality takes turns of its own
    one_each = ModalityRouter(16, 2)(inputs)
    assert torch.equal(one_each.expert_N, inputs.modality_T)
    random = FixedRouter(16, 8, "random")(inputs)
    assert len(set(random.expert_N.tolist())) == 8 and not torch.equal(random.expert_N, balanced.expert_N)


def test_hash_follows_the_identity_alone() -> None:
    inputs = routing_input(1000, 16)._replace(identity_T=torch.arange(1000) % 100)
    plan = HashRouter(16, 8, top_k=2)(inputs)
    first_T, second_T = plan.expert_N[:1000], plan.expert_N[1000:]
    assert not bool((first_T == second_T).any())
    assert torch.equal(first_T[:100], first_T[100:200])  # the same identities again
    other = HashRouter(16, 8, top_k=2, seed=1)(inputs)
    assert not torch.equal(other.expert_N, plan.expert_N)
    # 10,000 identities over 8 experts: 1,250 each, give or take 4 standard deviations of sqrt(10,000 / 8 * 7 / 8) = 33
    many = routing_input(10_000, 4)._replace(identity_T=torch.arange(10_000))
    load_E = torch.bincount(HashRouter(4, 8)(many).expert_N, minlength=8)
    assert int(load_E.min()) > 1250 - 132 and int(load_E.max()) < 1250 + 132


def test_hash_without_identities_is_refused() -> None:
    with pytest.raises(UserError, match="routes by token ids and patch codes, which this backbone does not provide"):
        HashRouter(16, 8)(routing_input(4, 16)._replace(identity_T=None))


def test_competing_routers_say_so() -> None:
    assert SoftRouter(4, 2).competes
    assert SinkhornRouter(4, 2).competes and ExpertChoiceRouter(4, 2).competes and SequenceTopKRouter(4, 2).competes
    assert not TopKRouter(4, 2).competes and not SigmoidBiasRouter(4, 2).competes
