"""The plugin: what a model's registry lists becomes claims. Shapes and storage decide about them."""

from torch import nn

import tiepolicy
from loom_ties.framework import LoomModel


@tiepolicy.hookimpl
def tiepolicy_claims(model: nn.Module | None) -> list[tiepolicy.Claim]:
    """Claim what the registry of every Loom model in the tree lists."""
    if model is None:  # a mapping of tensors is planned, not a module
        return []
    return [
        tiepolicy.Claim((f"{prefix}{owner}", f"{prefix}{user}"), "declared", f"LoomModel.registry[{owner!r}]")
        for path, part in tiepolicy.named_modules(model)
        if isinstance(part, LoomModel)
        for prefix in [f"{path}." if path else ""]
        for owner, users in part.registry.items()
        for user in users
    ]
