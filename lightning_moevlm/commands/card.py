"""A set's card as tables for people: what `moevlm data check` shows."""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lightning_moevlm.shards.check import CheckReport

_SIZES_SHOWN = 4


def card_of(report: "CheckReport", path: str) -> Group:
    """Return the card of a set that is in order."""
    manifest = report.manifest
    modality = report.cards[0].modality
    total = sum(card.num_samples for card in report.cards)
    lines = [
        f"{manifest.name} ({path}): {total:,} {modality} of {', '.join(manifest.members)}; "
        f"{manifest.tokenizer.vocab_size:,} token ids; digest {manifest.digest[:12]}",
        f"licence {manifest.licence} {manifest.licence_url}".rstrip(),
    ]
    if manifest.attribution:
        lines.append(manifest.attribution)
    columns = ["shards", "samples", "MB"]
    rows = {
        card.split: [f"{card.num_shards:,}", f"{card.num_samples:,}", f"{card.num_bytes / 1e6:.1f}"]
        for card in report.cards
    }
    if modality != "images":
        columns.append("tokens")
        for card in report.cards:
            rows[card.split].append(_range(card.caption_min, card.caption_median, card.caption_p95, card.caption_max))
    if modality != "texts":
        columns.append("pixels")
        for card in report.cards:
            rows[card.split].append(_range(card.side_min, card.side_median, card.side_p95, card.side_max))
    if any(card.num_questions for card in report.cards):
        columns.append("questions")
        for card in report.cards:
            rows[card.split].append(f"{card.num_questions:,}")
    columns += ["twice here", "in earlier split"]
    for card in report.cards:
        rows[card.split] += [f"{card.duplicates_within:,}", f"{card.duplicates_across:,}"]
    table = Table("split", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    for split, cells in rows.items():
        table.add_row(split, *cells)
    return Group(*(Text(line) for line in lines), table, *(Text(line) for line in _notes(report)))


def faults_of(report: "CheckReport") -> Table:
    """Return the table of samples that cannot be used, by cause."""
    table = Table("cause", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("samples", justify="right")
    for cause, num_samples in report.faults.items():
        table.add_row(cause, f"{num_samples:,}")
    return table


def _range(*quantiles: int) -> str:
    return " / ".join(f"{number:,}" for number in quantiles)


def _notes(report: "CheckReport") -> list[str]:
    notes = ["tokens, pixels of the shorter side: min / median / 95 % / max (pixels: the longest side)"]
    if report.sizes:
        shown = ", ".join(f"{width}x{height} ({num:,})" for (width, height), num in report.sizes[:_SIZES_SHOWN])
        others = f" and {len(report.sizes) - _SIZES_SHOWN:,} other sizes" if len(report.sizes) > _SIZES_SHOWN else ""
        notes.append(f"width x height: {shown}{others}")
    longest = max(card.caption_max for card in report.cards)
    if longest:
        total = sum(card.num_samples for card in report.cards)
        cut = {
            limit: sum(card.cut[limit] * card.num_samples for card in report.cards) / total
            for limit in report.cards[0].cut
        }
        shares = "; ".join(f"{limit}: {share:.1%}" for limit, share in cut.items() if share)
        notes.append(
            f"captions that lose their end, by data.max_text_len: {shares + '; ' if shares else ''}"
            f"{longest + 2} and more: none"
        )
    across = sum(card.duplicates_across for card in report.cards)
    if across:
        what = "captions" if report.cards[0].modality == "texts" else "pictures"
        notes.append(
            f"{across:,} {what} of an earlier split occur again in a later one: what is measured there is known"
        )
    return notes
