"""Key layouts of published weights, translated to ours."""

from collections.abc import Mapping

from torch import Tensor

_TIMM_TO_OURS = {
    ".attn.q_bias": ".attn.qkv.q_bias",
    ".attn.v_bias": ".attn.qkv.v_bias",
    ".attn.cpb_mlp.": ".attn.position_bias.cpb_mlp.",
}


def from_timm_swin_v2(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the entries of a headless timm `SwinTransformerV2` for a model with one bias MLP a block.

    Args:
        state_dict: tensors by timm's names (timm 1.0); names that are the same in both layouts stay.

    Returns:
        The same tensors by the names of `SwinTransformerV2(shared_bias=False)`.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        for timm_part, our_part in _TIMM_TO_OURS.items():
            name = name.replace(timm_part, our_part)
        renamed[name] = tensor
    return renamed
