"""Step 2, the plugin: what a Hugging Face model declares about its ties becomes claims; imports no transformers."""

from torch import nn

from tiepolicy import Claim, Facts, Source, hookimpl
from tiepolicy_hf._declared import declarations


@hookimpl
def tiepolicy_claims(model: nn.Module | None, facts: Facts) -> list[Claim]:
    """Claim what the true flags of every module of the tree declare, each pair by the first flag that does."""
    if model is None:
        return []
    claims: dict[tuple[str, str], Claim] = {}
    for declared in declarations(model, facts):
        if declared.value:
            for pair in declared.pairs:
                claims.setdefault(pair, Claim(pair, Source.DECLARED, declared.detail))
    return list(claims.values())
