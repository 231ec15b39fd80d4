"""The parser's nested complaints, as jsonargparse 4.53 words them, and the one line that is made of them."""

import pytest

from lightning_moevlm.parse_errors import told_from_the_mistake

INSIDE = (
    "Parser key \"model.backbone\": Problem with given class_path 'lightning_moevlm.models.VLMoE':\n"
    '  Parser key "moe":\n'
    "    Type collections.abc.Callable[[int], lightning_moevlm.layers.moe.MoEFFN] expects a function or a callable "
    "class: "
)
BEHIND = ". Got value: Namespace(class_path='lightning_moevlm.layers.MoEFFN', init_args=Namespace(router='NoRouter'))"


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            INSIDE + 'Parser key "router":\n  - Expected a path but NoRouter either not accessible or invalid\n'
            "  - Expected a dot import path string: NoRouter" + BEHIND,
            "model.backbone.moe.router: there is no class NoRouter; `moevlm list` shows what can be named, or give its "
            "class_path",
        ),
        (
            INSIDE + 'Parser key "router": Type collections.abc.Callable[[int, int], Router] expects a function or a '
            "callable class: Option 'top_kk' is not accepted. Got value: "
            "Namespace(class_path='lightning_moevlm.routers.TopKRouter', init_args=Namespace(top_kk='1'))" + BEHIND,
            "model.backbone.moe.router: TopKRouter takes no 'top_kk'; `moevlm describe TopKRouter` lists its options",
        ),
        (
            "Parser key \"model.backbone\": Problem with given class_path 'lightning_moevlm.models.VLMoE': "
            "Option 'dimm' is not accepted",
            "model.backbone: VLMoE takes no 'dimm'; `moevlm describe VLMoE` lists its options",
        ),
        (
            "Parser key \"model.backbone\": Problem with given class_path 'lightning_moevlm.models.VLMoE': "
            "Parser key \"dim\": Expected a <class 'int'>. Got value: wide",
            "model.backbone.dim: Expected a <class 'int'>. Got value: wide",
        ),
        (
            "unrecognized arguments: --trainer.max_stepz 3",
            "unrecognized arguments: --trainer.max_stepz 3; did you mean --trainer.max_steps? --help lists the options",
        ),
        ("Subcommand 'fit' does not\n accept it", "Subcommand 'fit' does not accept it"),
    ],
)
def test_mistakes_are_told_from_their_place(message: str, told: str) -> None:
    assert told_from_the_mistake(message, ["--trainer.max_steps", "--model.seed"]) == told
