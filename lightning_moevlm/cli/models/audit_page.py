"""Writes an audit as sentences, tables, a page and a record."""

import time
from collections.abc import Sequence

from lightning_moevlm.model.backbones.adopted.audit.records import Audit, OwnBalance, RouterFacts, Setting
from lightning_moevlm.study.report.render import list_versions, render
from lightning_moevlm.study.report.result_records import to_json
from lightning_moevlm.study.report.tables.table import NOTHING, Table, format_count, format_percent

_CLOSE = 0.02
"""Relative difference of a ratio to 1 that counts as none."""
_SHOWN = 8


def write_finding(audit: Audit) -> list[str]:
    """Return what an audit found, in sentences."""
    first = audit.routers[0]
    kinds = {(each.num_experts, each.top_k, each.score) for each in audit.routers}
    what = f"{first.num_experts} experts, top-{first.top_k}, {_score(first)}" if len(kinds) == 1 else "of several kinds"
    blocks = f"{_count(len(audit.routers), 'router')} in {_count(audit.num_layers, 'layer')}"
    return [
        f"{audit.model} has {blocks}: {what}.",
        *_on_balance(audit.balance, audit.transformers),
        *_on_biases(audit.routers),
        *_on_nothing(audit),
        *_on_loads(audit),
    ]


def make_tables(audit: Audit) -> list[Table]:
    """Return the tables of the page."""
    return [_balance_table(audit.balance), _router_table(audit.routers), _load_table(audit)]


def render_page(audit: Audit, name: str, finding: Sequence[str], tables: Sequence[Table], sample: str) -> str:
    """Return the page."""
    versions = list_versions("torch", "transformers")
    written = time.strftime("%Y-%m-%d %H:%M")
    size = format_count(audit.num_parameters)
    return render(
        "audit.html.j2",
        audit=audit, name=name, size=size, finding=finding, tables=tables, sample=sample, versions=versions,
        written=written,
    )  # fmt: skip


def write_record(audit: Audit, finding: Sequence[str], sample: str) -> dict[str, object]:
    """Return the audit as plain data."""
    record: dict[str, object] = to_json(audit)
    verdicts = {each.name: each.verdict for each in audit.balance.settings}
    return {**record, "verdicts": verdicts, "dead": to_json(audit.dead), "sample": sample, "finding": list(finding)}


def _on_balance(balance: OwnBalance, transformers: str) -> list[str]:
    configured, *others = balance.settings
    if not balance.coefficients and balance.acting is None:
        return [f"transformers {transformers} has no balance loss for this family, whatever its switches say."]
    coefficient = ", ".join(f"{name} is {value:g}" for name, value in balance.coefficients)
    acting = [each for each in others if each.verdict not in ("dead", "fails")]
    dead = [each.name for each in others if each.verdict == "dead"]
    lines = []
    if configured.verdict == "dead":
        lines.append(
            f"As configured its balance loss is dead: {coefficient or 'no coefficient is configured'}, but it adds "
            "nothing to the loss, and no gradient of it reaches the routers."
        )
        ways = " or ".join(each.name for each in acting)
        lines.append(f"It acts with {ways}." if acting else "None of its switches turns it on.")
    else:
        lines.append(f"As configured its balance loss acts: {coefficient}.")
    if (setting := balance.acting) is not None:
        lines.append(_on_size(setting, configured))
        if configured.verdict == "dead" and dead:
            lines.append(f"This switch is dead: {', '.join(dead)}.")
        if balance.over_parts is not None and abs(balance.over_parts - 1) > _CLOSE:
            lines.append(
                f"Over two micro-batches or two ranks the Trainer of transformers adds {balance.over_parts:.2f} times "
                "the balance loss of the joined batch: its weight grows with accumulation and world size."
            )
    return lines


def _on_size(setting: Setting, configured: Setting) -> str:
    assert setting.added is not None and setting.share is not None
    when = "It" if setting is configured else f"With {setting.name} it"
    scale = "" if setting.verdict == "alive" else f", {setting.scale:.2f} times what its coefficient says"
    share = format_percent(setting.share)
    return f"{when} adds {setting.added:.2g} to the loss{scale}, and is {share} of the gradient on the routers."


def _on_biases(routers: Sequence[RouterFacts]) -> list[str]:
    still = [each.bias for each in routers if each.bias is not None and each.bias.mover == "nothing"]
    if not still:
        return []
    low, high = min(bias.lowest for bias in still), max(bias.highest for bias in still)
    values = "all 0" if low == high == 0 else f"from {low:.2g} to {high:.2g}"
    choose = f"{_count(len(still), 'router')} {'chooses' if len(still) == 1 else 'choose'}"
    return [
        f"{choose} by a balancing bias ({still[0].name}, {values}) that nothing moves: it has no gradient, and a pass "
        "in training leaves it as it is. model.backbone.bias_rate moves it by the load."
    ]


def _on_nothing(audit: Audit) -> list[str]:
    moved = any(each.bias is not None and each.bias.mover == "forward pass" for each in audit.routers)
    if audit.balance.settings[0].verdict not in ("dead", "fails") or moved:
        return []
    return [
        "So nothing balances the experts where it is trained as configured. Here model.losses.load_balance does, and "
        "model.losses.cross_layer_balance is the loss of transformers."
    ]


def _on_loads(audit: Audit) -> list[str]:
    lines = []
    for modality in dict.fromkeys(load.modality for load in audit.loads):
        own = [load for load in audit.loads if load.modality == modality]
        worst = max(own, key=lambda load: load.max_violation)
        mean = sum(load.max_violation + 1 for load in own) / len(own)
        lines.append(
            f"{modality}, {worst.tokens:,} tokens: the most loaded expert gets {worst.max_violation + 1:.2f} times the "
            f"mean load in {worst.path}, and {mean:.2f} times in the mean of all layers."
        )
    count = sum(len(experts) for experts in audit.dead.values())
    total = sum(each.num_experts for each in audit.routers)
    lines.append(
        f"No token of the sample chose {count} of {total} experts, in {_count(len(audit.dead), 'layer')}."
        if count
        else f"Each of the {total} experts was chosen by some token of the sample."
    )
    return lines


def _balance_table(balance: OwnBalance) -> Table:
    rows = []
    for each in balance.settings:
        added = each.failure or NOTHING if each.added is None else f"{each.added:.3g}"
        share = NOTHING if each.share is None else format_percent(each.share)
        scale = NOTHING if each.scale is None else f"{each.scale:.2f}"
        rows.append((each.name, each.verdict, added, share, scale))
    parts = (
        ""
        if balance.over_parts is None
        else f" Summed over two micro-batches or ranks: {balance.over_parts:.2f} times."
    )
    return Table(
        "Balance loss of transformers",
        ("setting", "verdict", "added to the loss", "of the gradient on routers", "scale"),
        tuple(rows),
        (
            "scale: what is added, over the coefficient times E sum f P, the loss as it is defined for E experts: f is "
            "the share of choices that an expert gets, P its mean probability. It is known where scores are a softmax."
            + parts,
            f"Function: {balance.function or 'none in the file of the model'}.",
        ),
        essential=4,
    )


def _router_table(routers: Sequence[RouterFacts]) -> Table:
    rows = []
    for each in routers:
        shared = ", ".join(f"{one.name} ({one.size:.3g})" for one in each.shared) or NOTHING
        bias = NOTHING if each.bias is None else f"{each.bias.name}, moved by {each.bias.mover}"
        total = "varies" if each.weight_sum is None else f"{each.weight_sum:.3g}"
        cells = (each.path, str(each.num_experts), str(each.top_k), _score(each), total, shared, bias)
        rows.append((*cells, each.modality or "all"))
    return Table(
        "Routers",
        ("router", "experts", "top-k", "score", "sum of weights", "shared experts", "bias", "tokens"),
        tuple(rows),
        ("Sizes of shared experts are in units of one routed expert.",),
        essential=6,
    )


def _load_table(audit: Audit) -> Table:
    rows = []
    for load in audit.loads:
        dead = ", ".join(map(str, load.dead[:_SHOWN])) + (
            f" and {len(load.dead) - _SHOWN} more" if len(load.dead) > _SHOWN else ""
        )
        largest = max(range(len(load.loads)), key=load.loads.__getitem__)
        rows.append(
            (
                load.path,
                load.modality,
                f"{load.tokens:,}",
                f"{largest}: {format_percent(load.loads[largest])}",
                f"{load.max_violation:.2f}",
                f"{load.entropy:.3f}",
                f"{len(load.dead)}" + (f" ({dead})" if dead else ""),
            )
        )
    return Table(
        "Loads of the sample",
        ("router", "modality", "tokens", "largest load, of expert", "MaxVio", "entropy", "experts without a token"),
        tuple(rows),
        ("MaxVio: largest load over the mean load, less 1. Entropy: 1 is an even load, 0 is one expert alone.",),
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _score(router: RouterFacts) -> str:
    return "a score of its own" if router.score is None else {"given": "probabilities"}.get(router.score, router.score)
