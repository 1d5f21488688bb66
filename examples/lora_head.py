"""A LoRA model with a head of its own (`modules_to_save`), whose checkpoints hold what was trained and nothing else.

python examples/lora_head.py
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed import checkpoint as dcp
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


def adapted() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A base model with its adapters, and the base's own tensors, taken before it had any."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG)
    own = base.state_dict()
    return get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])), own


def main() -> None:
    """Train, save what was trained, resume, merge, load as a plain model."""
    model, base = adapted()
    print(tiepolicy.plan(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(0, 500, (4, 16))
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        tiepolicy_dcp.save(f"{folder}/step_3", model=model, external={"base": base})
        stored = dcp.FileSystemReader(f"{folder}/step_3").read_metadata().state_dict_metadata
        print("stored, beside a digest of each tensor of the base:", *sorted(stored), sep="\n  ")
        resumed, base = adapted()
        tiepolicy_dcp.load(f"{folder}/step_3", model=resumed, external={"base": base})
        same = all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in model.state_dict().items())
        print(f"resumed, the same weights to the bit: {same}")

        before = model.eval()(ids).logits
        tiepolicy_hf.save_pretrained(model.merge_and_unload(), f"{folder}/merged")
        plain = LlamaForCausalLM.from_pretrained(f"{folder}/merged")
        print(
            f"merged, and read by transformers: the same logits {torch.allclose(before, plain(ids).logits, atol=1e-5)}"
        )
        print(f"tie_word_embeddings in its config.json: {plain.config.tie_word_embeddings}")


if __name__ == "__main__":
    main()
