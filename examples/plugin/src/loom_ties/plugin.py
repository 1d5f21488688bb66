"""The plugin: what a model's registry lists becomes claims. Shapes and storage decide about them."""

from torch import nn

import tiepolicy
from loom_ties.framework import LoomModel


@tiepolicy.hookimpl
def tiepolicy_claims(model: nn.Module | None) -> list[tiepolicy.Claim]:
    """Claim what the registry of every Loom model in the tree lists."""
    if model is None:
        return []
    return [
        tiepolicy.Claim((prefix + owner, prefix + user), "declared", f"LoomModel.registry[{owner!r}]")
        for prefix, part in _parts(model)
        for owner, users in part.registry.items()
        for user in users
    ]


def _parts(model: nn.Module) -> list[tuple[str, LoomModel]]:
    # tiepolicy's names have no prefixes of wrappers such as torch.compile, and neither have these.
    return [
        (f"{path}." if path else "", part)
        for path, part in tiepolicy.named_modules(model)
        if isinstance(part, LoomModel)
    ]
