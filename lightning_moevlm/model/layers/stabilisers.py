"""The switches of the trunk that keep training stable: one record of named fields, each neutral or off by default.

    what grows                   what holds it
    attention logits             qk_norm, logit_cap                (arXiv 2302.05442; 2408.00118, section 2)
    attention sinks              attention_gate                    (2505.06708)
    branches of a block          sub_norm, norm_placement          (2210.06423; 2111.09883; 2501.00656)
    gated hidden units           glu                               (DeepSeek-V4, section 4.2.3; Kimi K3, section 2.3.2)
    the residual stream          layer_scale, residual_scaling     (2103.17239; 2203.00555)
    the first steps              init_scheme, init_scale           (2101.03961, section 2.4)
    the gradient of the patches  freeze_patches                    (2104.02057, section 4)

Each switch is explained in its file: attention.py, norms.py, block.py, init_scheme.py, embeddings.py,
experts/gated_unit.py.
"""

from dataclasses import dataclass
from typing import Literal

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.model.experts import GLU
from lightning_moevlm.model.layers.norms import NormKind

NormPlacement = Literal["pre", "post", "sandwich", "output"]
"""pre: x + f(n(x)). post: n(x + f(x)). sandwich: x + n(f(n(x))). output: x + n(f(x))."""

ResidualScaling = Literal["depth", "deepnorm"]
"""depth: matrices that write to the residual start 1 / sqrt(2 blocks) smaller. deepnorm: DeepNet's alpha and beta."""

InitScheme = Literal["truncated_normal", "normal", "fan_in", "depth_scaled"]
"""Initial distribution of the matrices of the blocks, see init_scheme.py."""


@dataclass(frozen=True)
class ModelStabilisers:
    """Switches of the trunk. All but `qk_norm` start off; an arm sets one and leaves the others alone.

    Args:
        qk_norm: RMS-normalise queries and keys per head before their product. The action `QKClip` needs it off.
        logit_cap: attention logits become cap * tanh(logits / cap); 50 in Gemma 2. Leaves the fused attention kernel,
            see attention.py for the cost; null is off.
        attention_gate: multiplies heads' outputs by sigmoid(x W): head by one number per head, element by one per head
            and channel, with as many weights as the output projection (Qwen's gated attention); null is off.
        sub_norm: a norm inside each branch: before attention's output projection, and on the hidden units of every
            feed-forward before its last matrix (Sub-LN of Magneto and BEiT-3).
        norm: kind of all norms of the trunk but qk_norm's.
        norm_placement: pre: x + f(n(x)); post: n(x + f(x)); sandwich: x + n(f(n(x))); output: x + n(f(x)).
        layer_scale: initial value of a learned factor per channel on the output of each branch (CaiT: 0.1 at up to 18
            blocks, 1e-5 to 24, 1e-6 deeper; 0 starts from the identity); null is off.
        residual_scaling: depth: the matrices that write to the residual start smaller by 1 / sqrt(2 blocks) (GPT-2);
            deepnorm: n(alpha x + f(x)) with smaller values, outputs and feed-forwards, needs norm_placement post; null
            is off.
        init_scheme: distribution of the matrices of the blocks: truncated_normal or normal with the model's `init_std`,
            fan_in (std 1 / sqrt(fan-in), truncated; Switch), depth_scaled (fan_in, and matrices that write to the
            residual in the n-th block smaller by 1 / sqrt(2 n)).
        init_scale: multiplies the variance of those matrices; Switch uses 0.1 with fan_in.
        glu: bound of the gated units of experts and dense feed-forwards: {limit: 10} clamps both factors (DeepSeek-V4),
            {gate_scale: 4, up_scale: 25} bends them by tanh (SiTU-GLU of Kimi K3); null leaves SwiGLU.
        freeze_patches: leave the patch projection at its random start (MoCo v3).

    Raises:
        UserError: a value outside its range, or switches that exclude each other.
    """

    qk_norm: bool = True
    logit_cap: float | None = None
    attention_gate: Literal["head", "element"] | None = None
    sub_norm: bool = False
    norm: NormKind = "layer"
    norm_placement: NormPlacement = "pre"
    layer_scale: float | None = None
    residual_scaling: ResidualScaling | None = None
    init_scheme: InitScheme = "truncated_normal"
    init_scale: float = 1.0
    glu: GLU = None
    freeze_patches: bool = False

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        if self.logit_cap is not None:
            check_number("stabilisers.logit_cap", self.logit_cap, above=0, advice=", or null for no cap")
        if self.layer_scale is not None:
            check_number("stabilisers.layer_scale", self.layer_scale, least=0, advice=", or null for none")
        check_number("stabilisers.init_scale", self.init_scale, above=0, advice="; 1 changes nothing")
        if self.residual_scaling == "deepnorm" and self.norm_placement != "post":
            raise UserError(
                f"residual_scaling deepnorm weighs the residual under a norm of the sum, and norm_placement is "
                f"{self.norm_placement}: set norm_placement to post, or residual_scaling to depth or null"
            )
        if self.residual_scaling == "depth" and self.init_scheme == "depth_scaled":
            raise UserError(
                "residual_scaling depth and init_scheme depth_scaled both shrink the matrices that write to the "
                "residual: choose one of them"
            )
