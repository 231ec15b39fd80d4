"""Says what an atlas shows: what is specialised, and what is not."""

from collections import Counter

from lightning_moevlm.atlas.make_atlas import Atlas
from lightning_moevlm.atlas.statistics.claims import ALPHA

_NAMED = 3


def describe(atlas: Atlas) -> tuple[str, ...]:
    """Return the finding: how many experts serve something, the strongest, labels without any, labels not tested."""
    experts = sum(each.layer.num_experts for each in atlas.of_layers)
    claims = [
        (claims[0], each.layer.layer, expert)
        for each in atlas.of_layers
        for expert, claims in enumerate(each.claims)
        if claims
    ]
    titles = {label.name: label.title.lower() for label in atlas.labels}
    layers = "1 layer" if len(atlas.of_layers) == 1 else f"{len(atlas.of_layers)} layers"
    lines = [
        f"{len(claims)} of {experts} experts in {layers} are specialised (p at most {ALPHA:g} after Holm): they serve "
        "something more often than chance or a simple rule would make them."
    ]
    by_label = Counter(claim.label for claim, _, _ in claims)
    if by_label:
        parts = ", ".join(f"{titles[name]} ({count})" for name, count in by_label.most_common())
        lines.append(f"What they serve first: {parts}.")
    for claim, layer, expert in sorted(claims, key=lambda each: -each[0].bits)[:_NAMED]:
        lines.append(
            f"{layer}, expert {expert}: {titles[claim.label]} “{claim.value}” is {claim.share:.0%} of its tokens with "
            f"this label and {claim.base:.1%} of all such tokens: lift {claim.lift:.1f}, interval {claim.low:.1f} to "
            f"{claim.high:.1f}."
        )
    named = {claim.label for each in atlas.of_layers for claims in each.claims for claim in claims}
    tested = {result.label.name for each in atlas.of_layers for result in each.results}
    rest = [titles[label.name] for label in atlas.labels if label.name in tested - named]
    if rest:
        lines.append(f"No expert is shown to be specialised by: {', '.join(rest)}.")
    untested = [titles[label.name] for label in atlas.labels if label.name not in tested]
    if untested:
        lines.append(f"Not tested, since no layer has tokens of two values: {', '.join(untested)}.")
    return tuple(lines)
