"""Loom, a framework in one class: a model keeps a registry of the weights that are meant to be one tensor."""

from torch import nn


class LoomModel(nn.Module):
    """An embedding and two heads.

    Args:
        vocab_size: Rows of the embedding.
        head_sizes: Rows of each head. A head that has as many as the embedding uses its weight.
        hidden_size: Columns of all of them.
    """

    def __init__(self, *, vocab_size: int, head_sizes: tuple[int, ...], hidden_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, hidden_size)
        self.heads = nn.ModuleList(nn.Linear(hidden_size, size, bias=False) for size in head_sizes)
        #: What is meant to be shared: the owner's name, and the names that use it.
        self.registry = {"table.weight": [f"heads.{index}.weight" for index in range(len(head_sizes))]}
        for head, size in zip(self.heads, head_sizes, strict=True):
            if size == vocab_size:
                head.weight = self.table.weight
