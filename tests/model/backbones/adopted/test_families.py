"""Walks every family with experts of the installed transformers; its table is the one in the guide.

`make families` writes the table anew.
"""

import copy
import os
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

import transformers

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.backbones import HuggingFaceModel, adopted
from lightning_moevlm.model.backbones.adopted.routing.adopt import adopt
from lightning_moevlm.model.backbones.adopted.routing.current_pass import CurrentPass
from lightning_moevlm.model.backbones.adopted.routing.seam import find_seams
from lightning_moevlm.model.dispatch import LoopDispatcher
from lightning_moevlm.model.generation import Decoding, generate
from tests.model.backbones.adopted.families import families, fill_tables, tiny
from tests.model.backbones.adopted.small_chat import plain_model
from tests.model.backbones.adopted.test_adopt import assert_equal
from tests.model.backbones.adopted.test_dispatch import assert_near, both
from tests.model.backbones.adopted.test_exact_generation import Heard, theirs

GUIDE = Path(adopted.__file__).with_name("README.md")
OF_FILES = ("architectures", "dtype", "transformers_version", "_name_or_path")
"""Of a configuration, what says where it was saved."""
_BEGIN, _END = "<!-- families -->\n", "<!-- end of families -->\n"

pytestmark = [
    pytest.mark.timeout(1200),  # on a busy machine
    pytest.mark.slow,  # 71 models, each forward and backward several times: a minute
    pytest.mark.skipif(transformers.__version__ != "5.23.0", reason="the table is that of the pinned version"),
]


def row(family: str) -> tuple[bool, str]:
    """Return whether the family is adopted, and its line of the table; an adopted one that is not exact fails."""
    torch.manual_seed(0)
    theirs = tiny(family).train()
    ours, current = copy.deepcopy(theirs), CurrentPass()
    try:
        layers = adopt(ours, current)
    except UserError:
        _, refusals = find_seams(theirs)
        reason = refusals[0].reason if refusals else "it has no router beside its experts"
        return False, f"| {family} | no | {reason} |"
    plans = assert_equal(theirs, ours, current)
    assert 0 < len(plans) <= len(layers)
    seams, _ = find_seams(theirs)
    facts = sorted({f"{seam.gate.score or 'its own (entropy and losses read softmax)'}" for seam in seams})
    isolated = ", experts of one modality" if any(seam.modality is not None for seam in seams) else ""
    return True, f"| {family} | exactly | {', '.join(facts)}{isolated} |"


def test_families_are_adopted_exactly_or_refused_with_a_reason() -> None:
    names = families()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [row(family) for family in names]
    count = sum(is_adopted for is_adopted, _ in found)
    assert count >= 58
    lines = [
        f"{count} of the {len(names)} families with experts in transformers {transformers.__version__} are adopted.\n",
        "| family | adopted | score of its router, or the reason why not |",
        "|---|---|---|",
        *(line for _, line in found),
    ]
    table = "\n".join(lines) + "\n"
    text = GUIDE.read_text("utf-8")
    before, rest = text.split(_BEGIN)
    written, after = rest.split(_END)
    if os.environ.get("MOEVLM_WRITE_GOLDEN") == "1":
        GUIDE.write_text(f"{before}{_BEGIN}{table}{_END}{after}", "utf-8")
    else:
        assert written == table


def test_the_loop_gives_every_family_its_own_logits() -> None:
    """To the bit, as transformers' eager back-end computes them; gradients to rounding."""
    refused, count = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for family in families():
            try:
                expected, found = both(family, LoopDispatcher())
            except UserError as error:
                refused += [family] if "takes no back-end" in str(error) else []
                continue
            assert torch.equal(found[0], expected[0]), family
            assert_near(expected, found)
            count += 1
    assert refused == ["longcat_flash", "step3p7"]  # of those that are adopted
    assert count == 64


def test_language_models_generate_with_their_own_logits() -> None:
    """To the bit at every position, with caches of all kinds and heads that scale, cap or cut."""
    ids = torch.randint(3, 90, (3, 4), generator=torch.Generator().manual_seed(1))
    valid, count = torch.ones_like(ids, dtype=torch.bool), 0
    for family in families():
        config = {key: value for key, value in tiny(family).config.to_dict().items() if key not in OF_FILES}
        try:
            model = HuggingFaceModel(config=config, image_size=16, vocab_size=96, max_text_len=16).eval()
        except UserError:  # refused, or no language model of its own
            continue
        fill_tables(model)
        heard = Heard(model)
        tokens_BN = generate(model, heard, None, ids, valid, Decoding(max_new_tokens=5)).text_BN
        their_tokens_BN, logits_BNV = theirs(plain_model(model), ids, valid)
        assert torch.equal(tokens_BN, their_tokens_BN), family
        assert torch.equal(heard.logits_BNV(), logits_BNV), family
        count += 1
    assert count == 53
