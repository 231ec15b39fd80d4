"""Every loss by hand, and the set that holds them."""

import math

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan
from lightning_moevlm.contracts.schedules import Ramp
from lightning_moevlm.model.layers import initialise
from lightning_moevlm.model.losses import (
    AuxiliaryLosses,
    ByOverflow,
    CrossLayerBalance,
    GlobalEntropy,
    GShard,
    Importance,
    LayerCounts,
    Load,
    LoadBalance,
    LocalEntropy,
    LossInput,
    MutualInformation,
    OutputZ,
    Place,
    ReLUL1,
    RoutedLayer,
    RouterOrthogonality,
    RouterZ,
    SequenceBalance,
    output_z,
    router_orthogonality,
)
from lightning_moevlm.model.losses.balancing.load import chances
from lightning_moevlm.model.routers import NoisyTopKRouter, SoftRouter
from tests.routing import NOTHING, full_plan, loss_of, relu_plan, routing_input, top_1_plan

# two experts, three tokens with p = (3/4, 1/4), (3/4, 1/4), (1/4, 3/4): chosen 0, 0, 1
THREE_TOKENS = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0]]).log()


def test_load_balance_by_hand() -> None:
    # f = (2/3, 1/3), P = (7/12, 5/12): 2 (14/36 + 5/36) = 38/36
    torch.testing.assert_close(loss_of(LoadBalance(), top_1_plan(THREE_TOKENS)), torch.tensor(38 / 36))


def test_load_balance_is_one_when_even() -> None:
    assert float(loss_of(LoadBalance(), top_1_plan(torch.eye(4) * 3.0))) == pytest.approx(1.0)


def test_load_balance_ignores_what_capacity_dropped() -> None:
    # the router is judged by what it asked for: dropping pairs must not make it look balanced
    plan = top_1_plan(torch.tensor([[2.0, 0.0]]).expand(4, 2))
    dropped = plan._replace(kept_N=torch.tensor([True, False, False, False]))
    assert torch.equal(loss_of(LoadBalance(), plan), loss_of(LoadBalance(), dropped))


def test_cross_layer_balance_adds_layers_up_and_needs_load_balance_off() -> None:
    # f = (2/3, 1/3) and P = (7/12, 5/12) in one layer, the other way round in the second: both are (1/2, 1/2) in sum
    layers = [top_1_plan(THREE_TOKENS), top_1_plan(THREE_TOKENS.flip(1))]
    losses = AuxiliaryLosses(None, None, cross_layer_balance=CrossLayerBalance(0.5))
    inputs = [LossInput(plan, place=Place(layer=str(number))) for number, plan in enumerate(layers)]
    joined, alone = (losses.terms(each)["cross_layer_balance"] for each in (inputs, inputs[:1]))
    assert float(joined.raw) == pytest.approx(1.0)
    assert float(joined.weighted) == pytest.approx(0.5)
    assert float(alone.raw) == pytest.approx(38 / 36)
    assert float(losses.means(losses.sums(inputs))["cross_layer_balance"].raw) == pytest.approx(1.0)
    # layers of another pass or of other tokens have a value of their own
    apart = [inputs[0], inputs[1]._replace(place=Place(source="text"))]
    assert float(losses.terms(apart)["cross_layer_balance"].raw) == pytest.approx(38 / 36)
    with pytest.raises(UserError, match="both on, so the load would be balanced twice: set one of them to null"):
        AuxiliaryLosses(cross_layer_balance=CrossLayerBalance())


def test_cross_layer_balance_counts_every_choice() -> None:
    # both experts of every token, so f = (1, 1): K = 2 whatever P is
    assert float(loss_of(CrossLayerBalance(), full_plan(THREE_TOKENS, top_k=2))) == pytest.approx(2.0)


def two_by_two() -> PairPlan:
    """Two sequences of an image and a text token; images sure of expert 0 by 3 to 1, texts of expert 1."""
    plan = top_1_plan(torch.tensor([[3.0, 1.0], [1.0, 3.0], [3.0, 1.0], [1.0, 3.0]]).log())
    return plan._replace(modality_T=torch.tensor([0, 1, 0, 1]), num_sequences=2)


def test_balance_of_a_sequence_by_hand() -> None:
    # tokens 0 and 1 are even among themselves, as are 2 and 3: 1. With tokens in the order 0, 2, 1, 3 each sequence has
    # f = (1, 0), P = (3/4, 1/4): 2 * 3/4 = 3/2, while the pooled batch stays at 1
    plan = two_by_two()
    assert float(loss_of(LoadBalance(scope="sequence"), plan)) == pytest.approx(1.0)
    order = torch.tensor([0, 2, 1, 3])
    sorted_plan = plan._replace(
        expert_N=plan.expert_N[order], probs_TE=plan.probs_TE[order], modality_T=plan.modality_T[order]
    )
    assert float(loss_of(LoadBalance(scope="sequence"), sorted_plan)) == pytest.approx(1.5)
    assert float(SequenceBalance()(LossInput(sorted_plan))) == pytest.approx(1.5)
    assert float(loss_of(LoadBalance(), sorted_plan)) == pytest.approx(1.0)


def test_sequence_balance_of_deepseek_leaves_the_bias_out() -> None:
    # two tokens with scores in the ratio 3 to 1, which a bias sent to expert 1: the scores' own f is (1, 0), P is
    # (3/4, 1/4): 2 * 3/4; by what was chosen f is (0, 1): 2 * 1/4. A token that took both experts counts for both
    plan = top_1_plan(torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log())._replace(expert_N=torch.tensor([1, 1]))
    assert float(loss_of(SequenceBalance(), plan)) == pytest.approx(1.5)
    assert float(loss_of(LoadBalance(scope="sequence"), plan)) == pytest.approx(0.5)
    both = full_plan(torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log(), noise=0.0, top_k=2)
    assert float(loss_of(SequenceBalance(), both)) == pytest.approx(1.0)
    # padding and choices that were not taken up count for nothing: f of the first token alone
    one = full_plan(torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log(), noise=0.0, valid_T=torch.tensor([True, False]))
    assert float(loss_of(SequenceBalance(), one)) == pytest.approx(1.5)


@pytest.mark.parametrize("per_modality", [False, True])
def test_without_a_bias_sequence_balance_is_load_balance_of_sequences(per_modality: bool) -> None:
    for top_k in (1, 2):
        plan = full_plan(torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), top_k=top_k)
        expected = loss_of(LoadBalance(scope="sequence", per_modality=per_modality), plan)
        torch.testing.assert_close(loss_of(SequenceBalance(per_modality=per_modality), plan), expected)


def test_balance_per_modality_by_hand() -> None:
    # images: f = (1, 0), P = (3/4, 1/4): 3/2; texts the other way round: 3/2. Pooled they are even
    plan = two_by_two()
    assert float(loss_of(LoadBalance(per_modality=True), plan)) == pytest.approx(1.5)
    assert float(loss_of(LoadBalance(), plan)) == pytest.approx(1.0)


def test_a_modality_or_sequence_without_tokens_does_not_dilute_the_mean() -> None:
    plan = two_by_two()
    only_first_image = torch.tensor([True, False, False, False])
    alone = plan._replace(valid_T=only_first_image, chosen_N=only_first_image)
    for scope in ("micro_batch", "sequence"):
        for per_modality in (False, True):
            loss = LoadBalance(scope=scope, per_modality=per_modality)  # type: ignore[arg-type]
            assert float(loss_of(loss, alone)) == pytest.approx(1.5)


def test_global_balance_takes_the_load_from_the_step_by_hand() -> None:
    # load of the step: (3, 1) from images and (0, 4) from text. P of this plan is (7/12, 5/12), all of it images
    chosen_AE = torch.tensor([[3, 1], [0, 4]])
    inputs = LossInput(
        top_1_plan(THREE_TOKENS), None, LayerCounts(chosen_AE, chosen_AE, torch.tensor([4, 4]), 0.5, NOTHING)
    )
    # pooled f = (3/8, 5/8): 2 (21/96 + 25/96) = 92/96
    assert float(LoadBalance(scope="global")(inputs)) == pytest.approx(92 / 96)
    # of images alone f = (3/4, 1/4): 2 (21/48 + 5/48) = 52/48
    assert float(LoadBalance(scope="global", per_modality=True)(inputs)) == pytest.approx(52 / 48)
    # without counts, as in evaluation, it is that of the micro-batch
    assert float(LoadBalance(scope="global")(LossInput(inputs.plan, training=False))) == pytest.approx(38 / 36)


def test_balance_of_one_modality_by_hand() -> None:
    # images: f = (1, 0), P = (3/4, 1/4): 3/2; a sequence or plan without one has nothing to balance
    plan = two_by_two()
    without_text = plan._replace(valid_T=plan.modality_T == 0, chosen_N=plan.chosen_N & (plan.modality_T == 0))
    for scope in ("micro_batch", "sequence"):
        image, text = (LoadBalance(scope=scope, only=name) for name in ("image", "text"))  # type: ignore[arg-type]
        assert float(loss_of(image, plan)) == float(loss_of(text, plan)) == pytest.approx(1.5)
        assert float(loss_of(image, without_text)) == pytest.approx(1.5)
        assert float(loss_of(text, without_text)) == 0.0
    # by the load of the step (3, 1) and (0, 4), see above
    chosen_AE = torch.tensor([[3, 1], [0, 4]])
    counts = LayerCounts(chosen_AE, chosen_AE, torch.tensor([4, 4]), 0.5, NOTHING)
    inputs = LossInput(top_1_plan(THREE_TOKENS), None, counts)
    assert float(LoadBalance(scope="global", only="image")(inputs)) == pytest.approx(52 / 48)
    with pytest.raises(UserError, match=r"load_balance\.only is text, and per_modality balances both"):
        LoadBalance(only="text", per_modality=True)


def test_importance_by_hand() -> None:
    # p = (3/4, 1/4) and (1/4, 3/4) is even: 0. Twice the first: I = (3/2, 1/2), mean 1, variance 1/4
    even = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    assert float(loss_of(Importance(), top_1_plan(even))) == pytest.approx(0.0, abs=1e-7)
    assert float(loss_of(Importance(), top_1_plan(even[[0, 0]]))) == pytest.approx(0.25)
    # each modality of two_by_two has I in the ratio 3 to 1: 1/4, where the pool has 0
    assert float(loss_of(Importance(per_modality=True), two_by_two())) == pytest.approx(0.25)


def test_importance_does_not_see_the_noise() -> None:
    # V-MoE: noise makes the second token change its mind; without it both prefer expert 0 by 3 to 1, as above
    even = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    plan = top_1_plan(even)._replace(logits_TE=even[[0, 0]], noisy_logits_TE=even, noise_std_TE=torch.ones(2, 2))
    assert float(loss_of(Importance(), plan)) == pytest.approx(0.25)


def test_load_by_hand() -> None:
    # logits (1, 0), sigma 1/2, no noise drawn: threshold 1, chances Phi(0) = 1/2 and Phi(-2) = 0.0227501
    plan = top_1_plan(torch.tensor([[1.0, 0.0]]))
    plan = plan._replace(noise_std_TE=torch.full((1, 2), 0.5), noisy_logits_TE=plan.logits_TE)
    torch.testing.assert_close(chances(plan), torch.tensor([[0.5, 0.0227501]]))
    # CV^2 = ((0.5 - 0.02275) / (0.5 + 0.02275))^2
    assert float(loss_of(Load(), plan)) == pytest.approx(((0.5 - 0.0227501) / (0.5 + 0.0227501)) ** 2, rel=1e-5)


def test_load_threshold_is_the_kth_noisy_logit() -> None:
    # noisy logits (3, 2, 0), k = 2: threshold 2; logits (0, 2, 1), sigma 1: Phi(-2), Phi(0), Phi(-1)
    plan = full_plan(torch.tensor([[0.0, 2.0, 1.0]]), top_k=2)
    plan = plan._replace(noise_std_TE=torch.ones(1, 3), noisy_logits_TE=torch.tensor([[3.0, 2.0, 0.0]]))
    torch.testing.assert_close(chances(plan), torch.tensor([[0.0227501, 0.5, 0.1586553]]))


def a_layer() -> RoutedLayer:
    """What losses that are not for every router ask of a layer; this one is of softmax top-k."""
    return RoutedLayer("TopKRouter", num_experts=4, adds_noise=False, mixes=False, has_rows=True, rows_fit_experts=True)


def test_load_needs_noise_and_says_so() -> None:
    inputs = routing_input(8, 16)
    with pytest.raises(UserError, match="TopKRouter adds none: choose NoisyTopKRouter"):
        AuxiliaryLosses(load=Load()).check([a_layer()])
    AuxiliaryLosses(load=Load()).check([a_layer()._replace(adds_noise=True)])
    noisy = NoisyTopKRouter(16, 4)
    assert Load()(LossInput(noisy(inputs))) is not None
    assert Load()(LossInput(noisy.eval()(inputs), training=False)) is None


def test_load_is_left_out_of_evaluation() -> None:
    losses = AuxiliaryLosses(load=Load())
    terms = losses.terms([LossInput(plan, training=False) for plan in random_plans(2)])
    assert list(terms) == ["load_balance", "router_z"]


def test_gshard_sees_first_choices_alone() -> None:
    # first choices 0, 0, 1: as the Switch loss with k = 1, 38/36; with k = 2 of 2 experts the Switch loss is even
    plan = full_plan(THREE_TOKENS, top_k=2)
    assert float(loss_of(GShard(), plan)) == pytest.approx(38 / 36)
    assert float(loss_of(LoadBalance(), plan)) == pytest.approx(1.0)


def test_router_z_by_hand() -> None:
    # logsumexp(ln 1, ln 3) = ln 4; logsumexp(0, 0) = ln 2: mean of squares
    plan = top_1_plan(torch.tensor([[1.0, 3.0], [1.0, 1.0]]).log())
    ln2 = torch.tensor(2.0).log()
    torch.testing.assert_close(loss_of(RouterZ(), plan), ((2 * ln2) ** 2 + ln2**2) / 2)


def test_output_z_by_hand() -> None:
    # (1 + 9) / 2 = 5; beside a head with 1: (5 + 1) / 2 = 3
    assert float(output_z(torch.tensor([1.0, 3.0]))) == pytest.approx(5.0)
    assert float(OutputZ()({"text": torch.tensor([1.0, 3.0]), "image": torch.ones(7)}) or 0) == pytest.approx(3.0)


def test_output_z_is_left_out_without_a_head_that_predicts_classes() -> None:
    assert AuxiliaryLosses(None, None, OutputZ()).terms([]) == {}
    assert list(AuxiliaryLosses(None, None, OutputZ()).terms([], {"text": torch.ones(3)})) == ["output_z"]


def test_mutual_information_by_hand() -> None:
    # two tokens sure of different experts: ln 2 of information; both undecided, or both sure of one expert: none
    sure = torch.eye(2) * 100
    assert float(loss_of(MutualInformation(), top_1_plan(sure))) == pytest.approx(-math.log(2))
    assert float(loss_of(MutualInformation(), top_1_plan(torch.zeros(2, 2)))) == pytest.approx(0.0, abs=1e-6)
    assert float(loss_of(MutualInformation(), top_1_plan(sure[[0, 0]]))) == pytest.approx(0.0, abs=1e-6)
    # each modality of the first case alone knows nothing of its one token's expert
    plan = top_1_plan(sure)._replace(modality_T=torch.tensor([0, 1]))
    assert float(loss_of(MutualInformation(per_modality=True), plan)) == pytest.approx(0.0, abs=1e-6)


def test_mutual_information_is_local_plus_global_entropy() -> None:
    plan = random_plans(1)[0]
    local = float(LocalEntropy(image=1.0, text=None)(LossInput(plan)))
    spread = float(GlobalEntropy(text=None)(LossInput(plan)))
    assert float(loss_of(MutualInformation(), plan)) == pytest.approx(local + spread - math.log(4), rel=1e-5)


def test_relu_l1_by_hand() -> None:
    # weights (2, 0) and (1, 1): loads (2, 1), so f = 2 (2/3, 1/3); (4/3 * 3 + 2/3 * 1) / 2 tokens = 7/3; plain: 4 / 2
    plan = relu_plan(torch.tensor([[2.0, -1.0], [1.0, 1.0]]))
    assert float(loss_of(ReLUL1(), plan)) == pytest.approx(7 / 3)
    assert float(loss_of(ReLUL1(load_weighted=False), plan)) == pytest.approx(2.0)


def test_relu_l1_refuses_soft_slots() -> None:
    with pytest.raises(UserError, match="ReLURouter"):
        AuxiliaryLosses(relu_l1=ReLUL1()).check([a_layer()._replace(mixes=True)])


def test_router_orthogonality_by_hand() -> None:
    # cos^2 of (1, 0), (0, 2), (3, 3): 0, 1/2, 1/2
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    assert float(router_orthogonality(rows)) == pytest.approx(1 / 3)
    assert float(router_orthogonality(torch.eye(4) * 5)) == 0.0


def test_router_orthogonality_needs_rows_and_says_so() -> None:
    with pytest.raises(UserError, match="TopKRouter"):
        AuxiliaryLosses(router_orthogonality=RouterOrthogonality()).check([a_layer()._replace(has_rows=False)])


def mixed_plan() -> PairPlan:
    """Two image tokens, sure of experts 0 and 1; two text tokens, undecided between 0 and 1."""
    probs_TE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    plan = top_1_plan(torch.zeros(4, 2))
    modality_T = torch.tensor([Modality.IMAGE, Modality.IMAGE, Modality.TEXT, Modality.TEXT])
    return plan._replace(probs_TE=probs_TE, modality_T=modality_T)


def test_modality_entropies_by_hand() -> None:
    ln2 = math.log(2)
    mixed = LossInput(mixed_plan())
    assert float(LocalEntropy(image=1.0, text=None)(mixed)) == pytest.approx(0.0, abs=1e-6)
    assert float(LocalEntropy()(mixed)) == pytest.approx(ln2)
    assert float(LocalEntropy(image=1.0)(mixed)) == pytest.approx(ln2 / 2)
    assert float(GlobalEntropy()(mixed)) == pytest.approx(0.0, abs=1e-6)  # both modalities use both experts
    collapsed = mixed.plan._replace(probs_TE=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]))
    assert float(GlobalEntropy(image=None)(LossInput(collapsed))) == pytest.approx(ln2)
    assert float(GlobalEntropy()(LossInput(collapsed))) == pytest.approx(ln2 / 2)


def test_modality_entropies_weigh_modalities() -> None:
    # text's ln 2, three times, and image's 0, averaged over the two that occur
    assert float(LocalEntropy(image=1.0, text=3.0)(LossInput(mixed_plan()))) == pytest.approx(3 * math.log(2) / 2)


def test_global_entropy_is_content_above_its_threshold() -> None:
    # e^tau = 1.5 experts: ln 1.5 is below the ln 2 that text uses. Of 3 experts asked for, ln 3 - ln 2 is missing
    mixed = LossInput(mixed_plan())
    assert float(GlobalEntropy(min_image_experts=1.5, min_text_experts=1.5)(mixed)) == 0.0
    three = LossInput(mixed.plan._replace(probs_TE=torch.nn.functional.pad(mixed.plan.probs_TE, (0, 1))))
    three = LossInput(three.plan._replace(logits_TE=torch.zeros(4, 3)))
    assert float(GlobalEntropy(image=None)(three)) == pytest.approx(math.log(3) - math.log(2))
    assert float(GlobalEntropy(image=None, min_text_experts=2)(three)) == pytest.approx(0.0, abs=1e-6)


def test_global_entropy_refuses_experts_that_are_not_there() -> None:
    with pytest.raises(UserError, match="at most 2"):
        AuxiliaryLosses(global_entropy=GlobalEntropy(min_text_experts=3)).check([a_layer()._replace(num_experts=2)])
    with pytest.raises(UserError, match="1 or more"):
        GlobalEntropy(min_image_experts=0.5)


def test_a_modality_that_is_absent_does_not_dilute_the_mean() -> None:
    # LIMoE's pooled balance hides the collapse of the smaller modality; here a missing one must not halve the other
    plan = mixed_plan()
    text_only = plan._replace(valid_T=plan.modality_T == Modality.TEXT)
    assert float(LocalEntropy(image=1.0)(LossInput(text_only))) == pytest.approx(math.log(2))


def random_plans(count: int) -> list[PairPlan]:
    generator = torch.Generator().manual_seed(0)
    return [top_1_plan(torch.randn(8, 4, generator=generator)) for _ in range(count)]


def test_terms_are_means_over_plans_with_their_weights() -> None:
    plans = random_plans(2)
    terms = AuxiliaryLosses(LoadBalance(0.5), RouterZ(0.25)).terms([LossInput(plan) for plan in plans])
    balance, z = (sum(loss_of(loss, plan) for plan in plans) / 2 for loss in (LoadBalance(), RouterZ()))
    torch.testing.assert_close(terms["load_balance"].raw, balance)
    torch.testing.assert_close(terms["router_z"].weighted, z * 0.25)


def test_a_weight_in_force_replaces_the_first_one() -> None:
    losses = AuxiliaryLosses(LoadBalance(Ramp(0.0, 1.0, 10)), RouterZ(0.25))
    inputs = [LossInput(plan) for plan in random_plans(1)]
    assert {name: term.weight for name, term in losses.terms(inputs).items()} == {"load_balance": 0.0, "router_z": 0.25}
    assert losses.terms(inputs, weights={"load_balance": 0.5})["load_balance"].weight == 0.5
    adaptive = AuxiliaryLosses(LoadBalance(ByOverflow(0.1, start=0.125)))
    assert adaptive.terms(inputs)["load_balance"].weight == 0.125


def test_null_turns_one_loss_off_and_leaves_the_other() -> None:
    inputs = [LossInput(plan) for plan in random_plans(1)]
    assert list(AuxiliaryLosses(load_balance=None).terms(inputs)) == ["router_z"]
    three = AuxiliaryLosses(importance=Importance(), router_z=None, local_entropy=LocalEntropy())
    assert list(three.terms(inputs)) == ["load_balance", "importance", "local_entropy"]
    assert list(AuxiliaryLosses(router_z=None).terms(inputs)) == ["load_balance"]


def test_a_dense_model_has_no_terms() -> None:
    assert AuxiliaryLosses().terms([]) == {}


def test_losses_of_soft_slots() -> None:
    # nothing is chosen: the load of an expert is its share of the tokens' mixes
    router = SoftRouter(16, 4)
    initialise(router, seed=0, std=0.5)
    plan = router(routing_input(8, 16))
    mean_prob_E = plan.probs_TE.mean(dim=0)
    torch.testing.assert_close(loss_of(LoadBalance(), plan), 4 * mean_prob_E.square().sum())
    losses = (LoadBalance(scope="sequence", per_modality=True), SequenceBalance(), GlobalEntropy(), Importance())
    for loss in losses:
        assert bool(loss(LossInput(plan)).isfinite())
