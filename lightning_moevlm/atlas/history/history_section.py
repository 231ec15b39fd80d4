"""Tells when experts took their roles, and whether other runs give the same ones."""

from collections.abc import Mapping
from typing import Any

from lightning_moevlm.atlas.causal.effects import Effect
from lightning_moevlm.atlas.causal.show_effect import effect_record, show_effect
from lightning_moevlm.atlas.history.follow import History, Place
from lightning_moevlm.atlas.history.matching import Agreement, Null
from lightning_moevlm.atlas.section import Section, finite, show_p
from lightning_moevlm.study.report.tables.table import NOTHING, Table


def history_section(found: History, frozen: Mapping[tuple[int, str], Effect] | None = None) -> Section:
    """Return the section of a run's checkpoints.

    frozen: effects of their choices in the final model, by step and layer; None: not measured.
    """
    sentences, tables, records = _sentences(found), _tables(found), _records(found)
    if frozen is not None:
        tables = (*tables, _frozen_table(frozen))
        sentences = (*sentences, *_frozen_sentences(frozen))
        records["frozen_choices"] = [
            {"step": step, "layer": layer, "loss": effect_record(effect)} for (step, layer), effect in frozen.items()
        ]
    return Section("history", "When did it come about?", sentences, tables, records)


def _frozen_table(frozen: Mapping[tuple[int, str], Effect]) -> Table:
    rows = tuple(
        (layer, str(step), show_effect(effect), show_p(effect.p_adjusted)) for (step, layer), effect in frozen.items()
    )
    notes = (
        "Change of the task loss [95 %] if one layer of the model makes the choices of the checkpoint.",
        "Above 0 is harm. p: after Holm over the layers of a step.",
    )
    return Table("Choices of earlier checkpoints in the final model", ("layer", "step", "loss", "p"), rows, notes)


def _frozen_sentences(frozen: Mapping[tuple[int, str], Effect]) -> tuple[str, ...]:
    """Return the largest effect of the first step and of the last."""
    lines = []
    for step in dict.fromkeys((min(step for step, _ in frozen), max(step for step, _ in frozen))):
        layer, effect = max(
            ((layer, e) for (at, layer), e in frozen.items() if at == step), key=lambda each: each[1].mean
        )
        lines.append(
            f"If one layer makes the choices of step {step}, the loss changes most in {layer}: {show_effect(effect)}."
        )
    return tuple(lines)


def seeds_section(runs: Mapping[str, Mapping[Place, Agreement]]) -> Section:
    """Return the section of other runs, by name."""
    rows = tuple(
        (
            run,
            ", ".join(place),
            f"{each.agreement:.3f}",
            f"{each.loads.mean:.3f}",
            _show(each.loads),
            f"{each.positions.mean:.3f}",
            _show(each.positions),
        )
        for run, places in runs.items()
        for place, each in places.items()
    )
    columns = ("run", "layer, tokens", "agreement", "by loads", "repeats, p", "by loads and positions", "repeats, p")
    notes = (
        "Experts are matched one to one by the tokens that both serve. Agreement: share of choices of this run whose "
        "partner is chosen too.",
        "By loads: the mean of permutations of the other run's tokens; by loads and positions: of tokens at one "
        "position. Repeats: agreement beyond that, as a share of what is possible.",
    )
    every = [each for places in runs.values() for each in places.values()]
    low, high = (pick(each.positions.repeats for each in every) for pick in (min, max))
    sentences = (
        f"Matched to the experts of this run, those of {len(runs)} other {'run' if len(runs) == 1 else 'runs'} repeat "
        f"{_range(low, high)} of the division of labour beyond loads and positions.",
    )
    records = {
        run: [
            {
                **place._asdict(),
                "partner": list(each.partner),
                "shared": [finite(share) for share in each.shared],
                "agreement": finite(each.agreement),
                "loads": vars(each.loads),
                "positions": vars(each.positions),
                "tokens": each.num_tokens,
            }
            for place, each in places.items()
        ]
        for run, places in runs.items()
    }
    return Section(
        "seeds", "Does it repeat?", sentences, (Table("Experts of other runs", columns, rows, notes),), records
    )


def _range(low: float, high: float) -> str:
    """Return two shares of layers and modalities, or the one that both are."""
    first, last = f"{low:.0%}", f"{high:.0%}"
    return first if first == last else f"{first} to {last} (by layer and modality)"


def _show(null: Null) -> str:
    return f"{null.repeats:.1%}, {show_p(null.p)}"


def _sentences(found: History) -> tuple[str, ...]:
    lines = []
    first, last = found.steps[0], found.steps[-1]
    points = [each.points[0] for each in found.settling.values()]
    if points:
        low, high = (pick(point.saturation for point in points) for pick in (min, max))
        chance = max(point.by_chance for point in points)
        lines.append(
            f"After {first} of {last} steps routers make {_range(low, high)} of their final choices; loads alone give "
            f"at most {chance:.0%}."
        )
    turns = [turn for each in found.settling.values() for turn in each.turns]
    births = sum(turn.kind == "birth" for turn in turns)
    born = f"{births} expert was" if births == 1 else f"{births} experts were"
    lines.append(f"Between the {len(found.steps)} checkpoints {born} born and {len(turns) - births} died.")
    for (layer, label), course in sorted(found.specialisation.items(), key=lambda each: -_rise(each[1]))[:2]:
        start, end = course[0], course[-1]
        lines.append(
            f"NMI of {layer} and {label} goes from {start.nmi:.3f} (by chance {start.by_chance:.3f}) to {end.nmi:.3f} "
            f"({end.by_chance:.3f})."
        )
    return tuple(lines)


def _rise(course: Any) -> float:
    return float(course[-1].nmi - course[-1].by_chance - course[0].nmi + course[0].by_chance)


def _tables(found: History) -> tuple[Table, ...]:
    settling = tuple(
        (
            ", ".join(place),
            str(point.step),
            f"{point.saturation:.3f}",
            f"{point.by_chance:.3f}",
            NOTHING if point.fluctuation is None else f"{point.fluctuation:.3f}",
            str(point.alive),
            ", ".join(f"{turn.kind} of {turn.expert}" for turn in each.turns if turn.step == point.step) or NOTHING,
        )
        for place, each in found.settling.items()
        for point in each.points
    )
    columns = ("layer, tokens", "step", "saturation", "by chance", "fluctuation", "experts alive", "since the last")
    notes = (
        "saturation: share of the final choices that are made (OLMoE, 2409.02060, section 5.1); by chance: if choices "
        "were independent.",
        "fluctuation: share of the choices of the checkpoint before that are not made (StableMoE, 2204.08396).",
        "alive: with at least 1 % of the even load.",
    )
    nmi = tuple(
        (layer, label, *(f"{each.nmi:.3f} ({each.by_chance:.3f})" for each in course))
        for (layer, label), course in found.specialisation.items()
        if len(course) == len(found.steps)
    )
    of_steps = ("layer", "label", *(f"step {step}" for step in found.steps))
    return (
        Table("Routing over checkpoints", columns, settling, notes),
        Table("NMI over checkpoints", of_steps, nmi, ("In brackets: by chance, the largest mean of the null models.",)),
    )


def _records(found: History) -> dict[str, Any]:
    return {
        "steps": list(found.steps),
        "settling": [
            {
                **place._asdict(),
                "tokens": each.num_tokens,
                "points": [
                    {**point._asdict(), "load_E": [finite(load) for load in point.load_E]} for point in each.points
                ],
                "turns": [turn._asdict() for turn in each.turns],
            }
            for place, each in found.settling.items()
        ],
        "nmi": [
            {"layer": layer, "label": label, "points": [each._asdict() for each in course]}
            for (layer, label), course in found.specialisation.items()
        ],
    }
