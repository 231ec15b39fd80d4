"""Tells what experts are needed for."""

from collections.abc import Sequence
from typing import Any

from lightning_moevlm.atlas.causal.effects import ALPHA, GroupEffect
from lightning_moevlm.atlas.causal.examine import Examination
from lightning_moevlm.atlas.causal.groups import EVERY
from lightning_moevlm.atlas.causal.roles import Need, Role, TestedClaim
from lightning_moevlm.atlas.causal.show_effect import COLUMNS, effect_record, effect_row, show_effect
from lightning_moevlm.atlas.section import Section, show_p
from lightning_moevlm.study.report.tables.table import NOTHING, Table

_LOSS = "Effects are changes of the task loss [95 %]; above 0 is harm."
_SHOWN, _GROUPS_SHOWN = 2, 5


def causal_section(found: Examination) -> Section:
    """Return the section of an examination."""
    return Section("needs", "What needs which expert?", _sentences(found), _tables(found), _records(found))


def _sentences(found: Examination) -> tuple[str, ...]:
    to = "went to the next-ranked expert" if found.to == "next" else "were dropped"
    tests = sum(len(each) for each in found.effects.values())
    needed = [role for role in found.roles if _is_needed(role)]
    specific = [role for role in found.roles if role.needed_for]
    lines = [
        f"Each of {len(found.effects)} experts was switched off on {found.num_samples} samples, and its tokens {to}; "
        f"p is corrected by Holm over {tests} tests of experts and groups.",
        f"Experts whose removal raises the loss of all samples: {len(needed)} of {len(found.effects)}. Experts that "
        f"are needed for a group of samples that they serve: {len(specific)}.",
    ]
    for role in specific[: 2 * _SHOWN]:
        groups = ", ".join(f"{each.group} ({show_effect(each.loss)})" for each in role.needed_for[:_SHOWN])
        lines.append(f"{str(role.expert).capitalize()} is needed for {groups}.")
    counts = {need: sum(claim.need is need for claim in found.claims) for need in Need}
    if found.claims:
        lines.append(
            f"Observed preferences for groups of samples: {len(found.claims)}. "
            + ", ".join(f"{need}: {count}" for need, count in counts.items())
            + "."
        )
    unserved = sum(len(role.hurts) for role in found.roles)
    if unserved:
        lines.append(
            f"Removals that hurt a group more than the other samples, though the expert is not seen to serve it: "
            f"{unserved}. Long texts, or a rule of the router, may do that."
        )
    confirmed = [claim for claim in found.claims if claim.need is Need.SPECIFIC]
    alone = [claim for claim in found.claims if claim.need is Need.NOT_SEEN]
    strongest = sorted(confirmed, key=_excess, reverse=True)[:_SHOWN]
    strongest += sorted(alone, key=lambda claim: -claim.serves.lift)[:_SHOWN]
    return (*lines, *(claim.sentence for claim in strongest))


def _excess(claim: TestedClaim) -> float:
    more = None if claim.effect is None else claim.effect.more
    return 0.0 if more is None else more.mean


def _is_needed(role: Role) -> bool:
    return role.overall is not None and role.overall.mean > 0 and role.overall.p_adjusted <= ALPHA


def _tables(found: Examination) -> tuple[Table, ...]:
    return _expert_table(found), _claim_table(found), _layer_table(found)


def _expert_table(found: Examination) -> Table:
    rows = tuple(
        (
            str(role.expert),
            show_effect(role.overall),
            NOTHING if role.overall is None else show_p(role.overall.p_adjusted),
            _groups(role.needed_for),
            _groups(role.hurts),
        )
        for role in found.roles
    )
    return Table(
        "Experts by the harm of their removal",
        ("expert", "all samples", "p (Holm)", "needed for, more than elsewhere by", "hurts, but does not serve"),
        rows,
        (
            _LOSS,
            "A group is named if its loss rises, and more than that of the other samples, both after Holm. It needs "
            "the expert if the expert also serves it more often than chance and simple rules explain.",
        ),
    )


def _claim_table(found: Examination) -> Table:
    rows = tuple(
        (
            str(claim.serves.expert),
            claim.serves.group,
            f"{claim.serves.lift:.2f}",
            str(claim.need),
            show_effect(None if claim.effect is None else claim.effect.loss),
            show_effect(None if claim.effect is None else claim.effect.elsewhere),
            NOTHING if claim.effect is None else show_p(claim.effect.loss.p_adjusted),
        )
        for claim in found.claims
    )
    return Table(
        "What experts serve, and whether it needs them",
        ("expert", "serves", "lift", "removal", "effect on it", "elsewhere", "p (Holm)"),
        rows,
        (_LOSS, "not seen: another expert may serve the group as well, or the effect is small for this probe."),
    )


def _layer_table(found: Examination) -> Table:
    terms = list(dict.fromkeys(term for each in found.layers for term in each.right))
    rows = tuple(
        (
            each.layer,
            each.change,
            show_effect(each.loss),
            show_p(each.loss.p_adjusted),
            *(show_effect(each.right.get(term)) for term in terms),
        )
        for each in found.layers
    )
    return Table(
        "Other routings of a whole layer",
        ("layer", "routing", "all samples", "p (Holm)", *(f"right {term}" for term in terms)),
        rows,
        (_LOSS, "right: change of the share of right predictions of a term."),
    )


def _groups(effects: Sequence[GroupEffect]) -> str:
    return "; ".join(f"{each.group} {show_effect(each.more)}" for each in effects[:_GROUPS_SHOWN]) or NOTHING


def _records(found: Examination) -> dict[str, Any]:
    roles = {role.expert: role for role in found.roles}
    return {
        "tokens_of_a_removed_expert": found.to,
        "samples": found.num_samples,
        "columns": list(COLUMNS),
        "groups": dict(found.groups),
        "experts": [
            {
                "layer": expert.layer,
                "expert": expert.expert,
                "needed_for": [each.group for each in roles[expert].needed_for],
                "hurts": [each.group for each in roles[expert].hurts],
                "effects": {each.group: _effect(each) for each in effects},
            }
            for expert, effects in found.effects.items()
        ],
        "ranking": [[role.expert.layer, role.expert.expert] for role in found.roles],
        "claims": [
            {
                "layer": claim.serves.expert.layer,
                "expert": claim.serves.expert.expert,
                "serves": claim.serves.group,
                "lift": claim.serves.lift,
                "removal": str(claim.need),
                "sentence": claim.sentence,
            }
            for claim in found.claims
        ],
        "layers": [
            {
                "layer": each.layer,
                "routing": each.change,
                "group": EVERY,
                "loss": effect_record(each.loss),
                "right": {term: effect_record(effect) for term, effect in each.right.items()},
            }
            for each in found.layers
        ],
    }


def _effect(each: GroupEffect) -> dict[str, Any]:
    """Return the effects on a group; rows have the columns of the record, so that 768 experts stay readable."""
    found = {"loss": effect_row(each.loss)}
    if each.more is not None:
        found["more_than_elsewhere"] = effect_row(each.more)
    return found | {f"right_{term}": effect_row(effect) for term, effect in each.right.items()}
