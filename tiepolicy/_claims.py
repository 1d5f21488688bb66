"""Step 5, claiming: what somebody says about which names may be one tensor."""

from dataclasses import dataclass
from enum import StrEnum

from tiepolicy.errors import TiePolicyError


class Source(StrEnum):
    """Where a claim comes from."""

    STORAGE = "storage"
    DECLARED = "declared"
    USER = "user"


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement that some names may be one tensor. It decides nothing.

    Args:
        names: Two or more different names. The first is the one that the claimant would store.
        source: Where the claim comes from; its string value is accepted too.
        detail: What exactly says so, such as `config.tie_word_embeddings`.

    Raises:
        ValueError: If `source` is none of `Source`.
        TiePolicyError: If there are fewer than two names, or a name occurs twice.
    """

    names: tuple[str, ...]
    source: Source | str
    detail: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "source", Source(self.source))
        if len(self.names) < 2 or len(set(self.names)) != len(self.names):
            raise TiePolicyError(
                f"a claim needs two or more different names, not {list(self.names)}", names=map(str, self.names)
            )

    def pairs(self) -> list["Claim"]:
        """The claim as claims of two names each, every one with the first name."""
        if len(self.names) == 2:
            return [self]
        return [Claim((self.names[0], other), self.source, self.detail) for other in self.names[1:]]
