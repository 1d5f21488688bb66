"""Hugging Face models under the tie policy: declarations become claims, folders lose and invent nothing.

What reads and writes folders needs transformers, and is imported when it is first asked for: the plugin in this package
is loaded by everybody who plans a model.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiepolicy_hf._load import from_pretrained as from_pretrained
    from tiepolicy_hf._save import save_pretrained as save_pretrained
    from tiepolicy_hf._trainer import TiePolicyCallback as TiePolicyCallback
    from tiepolicy_hf._trainer import last_checkpoint as last_checkpoint

__all__ = ["TiePolicyCallback", "from_pretrained", "last_checkpoint", "save_pretrained"]

_HOMES = {
    "TiePolicyCallback": "_trainer",
    "from_pretrained": "_load",
    "last_checkpoint": "_trainer",
    "save_pretrained": "_save",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs {error.name}: pip install 'tiepolicy[hf]'") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
