"""Step 10: the frozen target, and the hidden states that it hands to the draft.

Shape suffixes: B batch, T tokens, V target vocabulary, E target hidden, A = 3E.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from eagle3.data import Batch, positions_of
from eagle3.description import (
    LOAD_ERRORS,
    LOAD_OPTIONS,
    choose_layers,
    describe_target,
    end_ids,
    load_tokenizer,
    model_class,
    require_tokens_fit,
    unreadable,
)
from eagle3.errors import TargetError
from eagle3.features import Features
from eagle3.terminal import waiting

# Share of the largest logit. Equal products differ by 2 ** -8 in bfloat16; scaled, capped or shifted ones by more.
_HEAD_TOLERANCE = 0.02


class FrozenTarget:
    """A causal language model of transformers, or the text part of one that also reads images, that is only read.

    Layer ids follow the "layers executed" convention: id k is the input of layer k, which is the output of layer k - 1
    and `hidden_states[k]` in transformers; id 0 is the embedding's output.

    Args:
        model: Changed in place to eval mode and `requires_grad=False`.
        tokenizer: The target's own.
        layers: Three layer ids, or None for a low, a middle and a high one.

    Attributes:
        config: The text config of the model.
        tokenizer: As given.
        vocab_size: V, rows of the embedding.
        embedding_VE: The embedding's weight itself, not a copy.
        head_VE: The output head's weight itself; the same tensor as `embedding_VE` when the target ties them.
        layer_ids: The three captured layers.
        end_ids: The tokens that end what the model generates, from its configs.

    Raises:
        TargetError: The model is too shallow, its layers cannot be found, its head is more than a matrix product with
            the last hidden state, or the tokenizer has more tokens than the embedding has rows.
        ConfigError: `layers` does not name three ascending layers of this model.
    """

    def __init__(
        self, model: PreTrainedModel, *, tokenizer: PreTrainedTokenizerBase, layers: Sequence[int] | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.tokenizer = tokenizer
        self.config = model.config.get_text_config(decoder=True)
        self.decoder, self.decoder_layers = _find_layers(model.get_decoder(), num_layers=self.config.num_hidden_layers)
        self.layer_ids = choose_layers(len(self.decoder_layers), layers)
        embedding: Any = model.get_input_embeddings()
        self.embedding_VE: nn.Parameter = embedding.weight
        self.vocab_size: int = self.embedding_VE.shape[0]
        require_tokens_fit(tokenizer, self.vocab_size)
        self.end_ids = end_ids(model.generation_config, self.config)
        self.head_VE = self._checked_head()
        # Whether one forward can hold several documents side by side; found out when first asked.
        self._packs: bool | None = None

    @classmethod
    def load(
        cls,
        folder_or_name: str | Path,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        layers: Sequence[int] | None = None,
    ) -> "FrozenTarget":
        """Loads model and tokenizer from a folder or the local Hugging Face cache; reads safetensors and runs no code.

        Args:
            folder_or_name: A folder with config, weights and tokenizer, or a hub name that was downloaded before.
            dtype: Of the weights and features.
            device: One device for the whole model.
            layers: As for the class.

        Returns:
            The target, in evaluation mode.

        Raises:
            TargetError: Something is missing or cannot be read, or as for the class.
            ConfigError: As for the class.
        """
        tokenizer = load_tokenizer(folder_or_name)
        whole_config = describe_target(folder_or_name).whole_config
        try:
            with waiting("Loading the target"):
                loaded: Any = model_class(whole_config).from_pretrained(
                    folder_or_name, dtype=dtype, use_safetensors=True, output_loading_info=True, **LOAD_OPTIONS
                )
        except LOAD_ERRORS as error:
            raise unreadable(folder_or_name, part="model", error=error) from error
        model, info = loaded
        if info["missing_keys"]:
            # transformers fills them with random numbers and says so only in its log.
            raise TargetError(
                f"The weights in {folder_or_name} lack {', '.join(sorted(info['missing_keys']))}. "
                "Get the complete model; the folder holds only a part of it."
            )
        return cls(model.to(device), tokenizer=tokenizer, layers=layers)

    @torch.no_grad()
    def features(self, input_ids_BT: torch.Tensor, *, documents_BT: torch.Tensor | None = None) -> Features:
        """Runs the target once, up to its final norm: no logits are made.

        There is no attention mask. Padding stands on the right, and a causal model's token sees only what is to its
        left, so padding changes no state but its own, which nobody supervises.

        Args:
            input_ids_BT: int64 `(B, T)` on the target's device, padded on the right with any id.
            documents_BT: int64 `(B, T)`, equal for the tokens of one document, which stand side by side; None if every
                row is one document. Documents of one row do not see each other. A model that cannot keep them apart
                within a row is run on each alone.

        Returns:
            The features of all tokens, padding included.
        """
        if documents_BT is None:
            return self._features(input_ids_BT, None)
        if self._packs is None:
            self._packs = self._keeps_documents_apart()
        if self._packs:
            return self._features(input_ids_BT, positions_of(documents_BT))
        return self._features_one_by_one(input_ids_BT, documents_BT)

    def features_of(self, batch: Batch) -> Features:
        """Runs the target on a batch, which is on any device.

        Args:
            batch: Token ids and their masks.

        Returns:
            What the draft is trained on, on the target's device.
        """
        device = self.head_VE.device
        documents_BT = None if batch.documents_BT is None else batch.documents_BT.to(device)
        return self.features(batch.input_ids_BT.to(device), documents_BT=documents_BT)

    @torch.no_grad()
    def read_on(self, input_ids_BT: torch.Tensor, *, cache: Cache) -> Features:
        """Runs the target on what stands behind the tokens in a cache.

        Args:
            input_ids_BT: int64 `(B, T)` on the target's device.
            cache: Keys and values of the tokens before; those of these tokens are added.

        Returns:
            The features of the given tokens.
        """
        return self._features(input_ids_BT, None, cache=cache)

    def _features(
        self, input_ids_BT: torch.Tensor, positions_BT: torch.Tensor | None, *, cache: Cache | None = None
    ) -> Features:
        width = self.head_VE.shape[1]
        aux_BTA = self.head_VE.new_empty(*input_ids_BT.shape, len(self.layer_ids) * width)
        # transformers takes positions that begin again for the sign of another document.
        positions = {} if positions_BT is None else {"position_ids": positions_BT}
        with self._capture_inputs(aux_BTA.split(width, dim=-1)):
            hidden_BTE = self.decoder(
                input_ids=input_ids_BT, past_key_values=cache, use_cache=cache is not None, **positions
            ).last_hidden_state
        return Features(aux_BTA=aux_BTA, hidden_BTE=hidden_BTE)

    def _features_one_by_one(self, input_ids_BT: torch.Tensor, documents_BT: torch.Tensor) -> Features:
        width = self.head_VE.shape[1]
        aux_BTA = self.head_VE.new_empty(*input_ids_BT.shape, len(self.layer_ids) * width)
        hidden_BTE = self.head_VE.new_empty(*input_ids_BT.shape, width)
        for row, documents_T in enumerate(documents_BT.cpu()):
            lengths = documents_T.unique_consecutive(return_counts=True)[1].tolist()
            for start, length in zip(itertools.accumulate([0, *lengths]), lengths, strict=False):
                part = (slice(row, row + 1), slice(start, start + length))
                alone = self._features(input_ids_BT[part], None)
                aux_BTA[part], hidden_BTE[part] = alone.aux_BTA, alone.hidden_BTE
        return Features(aux_BTA=aux_BTA, hidden_BTE=hidden_BTE)

    def _keeps_documents_apart(self) -> bool:
        """Whether the second of two documents side by side has the states that it has alone, whatever the first is."""
        device = self.head_VE.device
        positions_BT = torch.arange(12, device=device)[None] % 6
        ids_BT = torch.arange(12, device=device)[None] % self.vocab_size
        other_ids_BT = ids_BT.clone()
        other_ids_BT[:, :6] = ids_BT[:, 6:].flip(1)
        try:
            second, again = (self._features(ids, positions_BT).hidden_BTE[:, 6:] for ids in (ids_BT, other_ids_BT))
        except TypeError:  # the model takes no positions
            return False
        alone = self._features(ids_BT[:, 6:], None).hidden_BTE
        difference = float((second - alone).abs().max())
        return torch.equal(second, again) and difference <= _HEAD_TOLERANCE * float(alone.abs().max())

    @contextmanager
    def _capture_inputs(self, slots: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within the block, each captured layer writes its input `(B, T, E)` into its slot."""
        handles = [
            self.decoder_layers[layer_id].register_forward_pre_hook(_copy_input_to(slot), with_kwargs=True)
            for layer_id, slot in zip(self.layer_ids, slots, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _checked_head(self) -> torch.Tensor:
        """The head's weight, once a short forward has shown that logits are the last hidden state times it.

        Models that scale, cap or shift their logits (Gemma 2, Cohere, Phi 2) put another distribution on top, which
        neither the loss nor an exported draft knows of.
        """
        head = self.model.get_output_embeddings()
        if head is None:
            raise TargetError(
                f"{type(self.model).__name__} has no output head, so it predicts no tokens. Choose a language model."
            )
        head_VE: torch.Tensor = head.weight
        ids_BT = torch.arange(min(8, self.vocab_size), device=head_VE.device)[None]
        hidden_BTE = self.decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
        widths = {"the head": head_VE.shape[1], "the last hidden state": hidden_BTE.shape[-1]}
        if set(widths.values()) != {self.config.hidden_size}:
            raise TargetError(
                f"The target's layers are {self.config.hidden_size} wide, but "
                + " and ".join(f"{name} is {width}" for name, width in widths.items())
                + ". The draft needs one width for all of them."
            )
        logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits.float()
        difference = float((logits_BTV - (hidden_BTE @ head_VE.T).float()).abs().max())
        if difference > _HEAD_TOLERANCE * float(logits_BTV.abs().max()):
            raise TargetError(
                f"The logits of {type(self.model).__name__} are not its last hidden state times its head (they differ "
                f"by up to {difference:.3g}): it scales, caps or shifts them, and a draft would learn another "
                "distribution. Choose a target without."
            )
        return head_VE


def _copy_input_to(slot: torch.Tensor) -> Callable[..., None]:
    # Copied at once: a layer may write into its input, and keeping states to concatenate them would need them twice.
    def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        slot.copy_(args[0] if args else kwargs["hidden_states"])

    return hook


def _find_layers(decoder: nn.Module, *, num_layers: int) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder, without a head if it has one, and its layers."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        # Only the outermost: a layer may hold as many experts as there are layers.
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and not nested:
            found[name] = module
    if len(found) != 1:
        raise TargetError(
            f"{type(decoder).__name__} has {len(found)} lists of {num_layers} modules ({', '.join(found) or 'none'}), "
            "but exactly one, the decoder layers, is needed to capture hidden states. Choose a target with one."
        )
    name, layers = next(iter(found.items()))
    if isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is not None:
        # What transformers takes for the decoder of a Llama 4 is a whole language model.
        decoder = decoder.get_submodule(name.rpartition(".")[0])
    return decoder, layers
