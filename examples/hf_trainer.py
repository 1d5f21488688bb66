"""`transformers.Trainer` on a model with a head of its own under a config that says it is tied.

python examples/hf_trainer.py
"""

import tempfile

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

import tiepolicy
import tiepolicy_hf


class Draft(LlamaForCausalLM):
    """A model that predicts a part of the vocabulary."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, 320, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss of ids `(B, L)` below 320."""
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=True,  # copied from a target, and wrong here
)


def train(folder: str, *, max_steps: int) -> Draft:
    """Go on from the newest finished checkpoint in `folder`, if there is one."""
    torch.manual_seed(0)
    draft = Draft(CONFIG)
    examples = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 320, (32, 8))]
    arguments = TrainingArguments(
        folder,
        max_steps=max_steps,
        save_steps=3,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(draft, arguments, train_dataset=examples, callbacks=[tiepolicy_hf.TiePolicyCallback()])
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=tiepolicy_hf.last_checkpoint(folder))
    return draft


def main() -> None:
    """Train 6 steps at once, and 3 and then the rest; compare."""
    print(tiepolicy.plan(Draft(CONFIG)))
    with tempfile.TemporaryDirectory() as whole_folder, tempfile.TemporaryDirectory() as cut_folder:
        whole = train(whole_folder, max_steps=6)
        train(cut_folder, max_steps=3)
        resumed = train(cut_folder, max_steps=6)
        same = all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
        print(f"resumed, the same weights to the bit: {same}")

        folder = tiepolicy_hf.last_checkpoint(cut_folder)
        loaded = tiepolicy_hf.from_pretrained(Draft, folder)
        loaded.tie_weights()
        print(f"its head {tuple(loaded.lm_head.weight.shape)} survives tie_weights(): ", end="")
        print(torch.equal(loaded.lm_head.weight, resumed.lm_head.weight))
        print(f"tie_word_embeddings in its config.json: {loaded.config.tie_word_embeddings}")


if __name__ == "__main__":
    main()
