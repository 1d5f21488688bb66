"""A head of bytes and scales under a config that says it is the embedding: saved and loaded as what it is.

python examples/quantized_head.py
"""

import tempfile

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tiepolicy
import tiepolicy_dcp
import tiepolicy_hf

CONFIG = LlamaConfig(
    vocab_size=500,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=True,
)


class ByteLinear(nn.Module):
    """A linear map with a byte for each weight and a scale for each row."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_rows, width, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(num_rows, 1))

    @staticmethod
    def of(weight: torch.Tensor) -> "ByteLinear":
        """Quantise a weight `(num_rows, width)`."""
        linear = ByteLinear(*weight.shape)
        linear.scale = weight.detach().abs().amax(1, keepdim=True) / 127
        linear.weight = (weight.detach() / linear.scale).round().to(torch.int8)
        return linear

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States `(B, L, width)` to logits `(B, L, num_rows)`."""
        return nn.functional.linear(states, self.weight * self.scale)


class Quantized(LlamaForCausalLM):
    """A model with a quantised head, whatever its config says."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head = ByteLinear(config.vocab_size, config.hidden_size)


def main() -> None:
    """Quantise the head of a tied model, save it in both formats, load it."""
    torch.manual_seed(0)
    model = Quantized(CONFIG)
    model.lm_head = ByteLinear.of(model.model.embed_tokens.weight)
    print(tiepolicy.plan(model))
    ids = torch.randint(0, 500, (1, 8))
    expected = model(ids).logits
    with tempfile.TemporaryDirectory() as folder:
        tiepolicy_hf.save_pretrained(model, f"{folder}/hf")
        loaded = tiepolicy_hf.from_pretrained(Quantized, f"{folder}/hf")
        loaded.tie_weights()
        print(f"Hugging Face folder: {loaded.lm_head.weight.dtype}, equal {torch.equal(expected, loaded(ids).logits)}")
        tiepolicy_dcp.save(f"{folder}/dcp", model=model)
        loaded = Quantized(CONFIG)
        tiepolicy_dcp.load(f"{folder}/dcp", model=loaded)
        print(f"DCP folder: {loaded.lm_head.weight.dtype}, equal {torch.equal(expected, loaded(ids).logits)}")


if __name__ == "__main__":
    main()
