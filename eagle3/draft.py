"""Step 18: builds the draft: one decoder layer that reads a token and a state and proposes the next token's state.

Shape suffixes: B batch, T tokens, V target vocabulary, D draft vocabulary, H draft hidden, E target hidden, A = 3E
captured states, N rows that carry loss, Q query heads, K key and value heads, d head dimension. A leading `...` stands
for B, T or for N: every method works on any leading shape.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eagle3.errors import DraftError
from eagle3.loss import head_loss


class Rope:
    """Rotary positions in the rotate-half convention of transformers, whose class computes the frequencies.

    Of two types (dynamic, longrope) the frequencies depend on the length of the text, so that all queries and keys of
    one must be rotated for the same length, whatever positions a call has.

    Not a module: its frequencies must stay float32 when the draft is cast to bfloat16, and must survive meta
    construction, where a non-persistent buffer would be lost.
    """

    def __init__(self, config: LlamaConfig) -> None:
        with torch.device("cpu"):
            embedding = LlamaRotaryEmbedding(config)
        rope: Any = config.rope_parameters
        self.depends_on_length = rope["rope_type"] in ("dynamic", "longrope")
        self._config = config
        # Not by transformers' class, whose frequencies also depend on the texts before.
        self._recompute: Any = ROPE_INIT_FUNCTIONS[rope["rope_type"]] if self.depends_on_length else None
        self._scaling = float(embedding.attention_scaling)
        self._inv_freq: Tensor = embedding.inv_freq.detach().clone()
        assert 2 * len(self._inv_freq) == config.head_dim

    def rotate(self, heads: Tensor, positions: Tensor, *, length: int) -> Tensor:
        """Rotates each head by its row's position.

        Args:
            heads: (..., rows, heads, d).
            positions: (rows,) or (..., rows) int64, in tokens.
            length: Of the text, in tokens.

        Returns:
            A new tensor like `heads`; angles are computed in float32, or in float64 for float64 heads.
        """
        precise = torch.promote_types(torch.float32, heads.dtype)
        cos, sin = self.angles(positions.to(heads.device), length=length, dtype=precise)
        cos, sin = cos[..., None, :].to(heads.dtype), sin[..., None, :].to(heads.dtype)
        low, high = heads.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    def angles(self, positions: Tensor, *, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Computes what each pair of elements is rotated by.

        Args:
            positions: (..., rows) int64, in tokens.
            length: Of the text, in tokens.
            dtype: float32 or better.

        Returns:
            Cosines and sines, (..., rows, d / 2) each, times the rope's scaling.
        """
        angles = positions.to(dtype)[..., None] * self._frequencies(length, positions.device).to(dtype)
        return angles.cos() * self._scaling, angles.sin() * self._scaling

    def _frequencies(self, length: int, device: torch.device) -> Tensor:
        """The frequencies (d / 2,) float32 for a text of this length."""
        if self.depends_on_length:
            self._inv_freq, _ = self._recompute(self._config, device, seq_len=length)
        self._inv_freq = self._inv_freq.to(device)
        return self._inv_freq


class _RMSNorm(nn.RMSNorm):
    """The norm of torch with its weight in the input's dtype.

    Under autocast a float32 weight meets bfloat16 states, for which torch has no fused kernel and warns.
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class _SelfAttention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        head_dim, num_kv_heads = config.head_dim, config.num_key_value_heads
        assert head_dim is not None  # LlamaConfig fills in what was not given
        assert num_kv_heads is not None
        self.head_dim = head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, config.hidden_size, bias=False)


class _Mlp(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.down_proj(functional.silu(self.gate_proj(inputs)) * self.up_proj(inputs))
        return outputs


class _Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = _RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = _RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = _SelfAttention(config)
        self.post_attention_layernorm = _RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = _Mlp(config)


class _Head(nn.Linear):
    """A head that also scores: FSDP2 gathers a weight for methods of its module, not for who reads it from outside."""

    def loss(self, states_PH: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """As `head_loss`, which takes the other arguments."""
        return head_loss(states_PH, self.weight, *args, **options)


class Draft(nn.Module):
    """The draft of EAGLE-3 (arXiv 2503.01840): one Llama layer whose attention reads a token and a state side by side.

    The residual stream is the state before its norm, and the state handed to the next step is the one before the
    final norm, unless the config's `norm_before_residual` or `norm_output` says otherwise; `fc_norm` normalises each
    captured state and `norm_before_fc` all three together before they are fused (EAGLE-3.1, arXiv 2605.09992).
    Parameters and buffers carry the names that serving engines read. The embedding is frozen, unless the draft is of
    another width than its target and so has one of its own.

    Built under `torch.device("meta")` and moved with `to_empty`, it is complete after `init_from_target_` or after a
    strict `load_state_dict`.

    Args:
        config: A Llama config with the keys of EAGLE-3, such as `draft_config` makes.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        width, eps = config.target_hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.requires_grad_(config.hidden_size != width)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(_RMSNorm(width, eps=eps) for _ in range(3))
        if config.norm_before_fc:
            self.input_norm = _RMSNorm(3 * width, eps=eps)
        self.fc = nn.Linear(3 * width, config.hidden_size, bias=False)
        self.midlayer = _Layer(config)
        self.norm = _RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = _Head(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.arange(config.vocab_size) < config.draft_vocab_size)
        self._rope = Rope(config)

    def get_input_embeddings(self) -> nn.Embedding:
        """Returns the module that holds the embedding, as transformers models do."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """Returns the module that holds the head over the draft vocabulary, as transformers models do."""
        return self.lm_head

    def target_ids(self) -> Tensor:
        """Returns the target's token id of each row of the head: (D,) int64, a new tensor."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    @torch.no_grad()
    def init_from_target_(self, *, embedding_VE: Tensor, head_VE: Tensor, draft_ids_D: Tensor) -> None:
        """Starts the draft from its target: its embedding, its head's rows, and normal weights in between.

        A draft of another width starts from the same rows, turned into its width by one random orthogonal matrix.

        Args:
            embedding_VE: The target's embedding; copied, unless the draft shares it already.
            head_VE: The target's head; its draft rows are copied.
            draft_ids_D: int64, distinct: the target's token id of each row of the draft's head.

        Raises:
            DraftError: A tensor of the target has another shape than the draft's config says.
        """
        self._check_target(embedding=embedding_VE, head=head_VE)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=self.config.initializer_range)
            elif isinstance(module, nn.RMSNorm):
                module.weight.fill_(1.0)
        rows_DE = head_VE[draft_ids_D.to(head_VE.device)]
        if self.config.hidden_size == self.config.target_hidden_size:
            if self.embed_tokens.weight is not embedding_VE:
                self.embed_tokens.weight.copy_(embedding_VE)
            self.lm_head.weight.copy_(rows_DE)
        else:
            like = self.fc.weight
            turn_EH = nn.init.orthogonal_(like.new_empty(self.config.target_hidden_size, self.config.hidden_size))
            self.embed_tokens.weight.copy_(embedding_VE.to(like) @ turn_EH)
            self.lm_head.weight.copy_(rows_DE.to(like) @ turn_EH)
        ids_D = draft_ids_D.to(self.d2t.device)
        self.d2t.copy_(ids_D - torch.arange(len(ids_D), device=ids_D.device))
        self.t2d.zero_()
        self.t2d[ids_D] = True

    def share_embedding_(self, embedding_VE: nn.Parameter) -> None:
        """Makes the target's embedding the draft's: the same tensor, so a live pair holds it once.

        A plan with the target as `external` then calls it the target's, and a checkpoint need not hold it. Moving the
        draft elsewhere or casting it would do that to the target's tensor, too. A draft of another width keeps its own:
        for it nothing changes.

        Args:
            embedding_VE: The weight of the target's embedding, on the device that the draft is on or goes to.

        Raises:
            DraftError: It has another shape than the draft's config says.
        """
        self._check_target(embedding=embedding_VE)
        if self.config.hidden_size == self.config.target_hidden_size:
            self.embed_tokens.weight = embedding_VE

    def _check_target(self, **tensors: Tensor) -> None:
        expected = (self.config.vocab_size, self.config.target_hidden_size)
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != expected:
                raise DraftError(
                    f"The target's {name} has shape {tuple(tensor.shape)}, but the draft's config describes "
                    f"{expected} (vocab_size, target_hidden_size). Give the target that the draft was made for."
                )

    def fuse(self, aux: Tensor) -> Tensor:
        """Turns captured states `aux` (..., A) into the states of step 0.

        Returns:
            States (..., H).
        """
        if self.config.fc_norm:
            parts = zip(self.fc_norm, aux.chunk(3, dim=-1), strict=True)
            aux = torch.cat([norm(part) for norm, part in parts], dim=-1)
        if self.config.norm_before_fc:
            aux = self.input_norm(aux)
        states: Tensor = self.fc(aux)
        return states

    def step_inputs(self, token_ids: Tensor, states: Tensor) -> Tensor:
        """Sets the normed embedding and the normed state side by side, the embedding first.

        Args:
            token_ids: (...) int64.
            states: (..., H).

        Returns:
            (..., 2H).
        """
        layer = self.midlayer
        # A target's embedding may be bfloat16 beside float32 weights of the draft.
        tokens: Tensor = layer.input_layernorm(self.embed_tokens(token_ids).to(states.dtype))
        return torch.cat((tokens, layer.hidden_norm(states)), dim=-1)

    def queries(self, inputs: Tensor, positions: Tensor, *, length: int) -> Tensor:
        """Projects step `inputs` (..., rows, 2H) at `positions` (..., rows) of texts of at most `length` tokens.

        Returns:
            Rotated queries (..., rows, Q, d).
        """
        return self._rope.rotate(self._heads(self.midlayer.self_attn.q_proj(inputs)), positions, length=length)

    def keys_values(self, inputs: Tensor, positions: Tensor, *, length: int) -> tuple[Tensor, Tensor]:
        """Projects step `inputs` (..., rows, 2H) at `positions` (..., rows) to rotated keys and values.

        `length` is that of `queries`.

        Returns:
            Both (..., rows, K, d).
        """
        attention = self.midlayer.self_attn
        keys = self._rope.rotate(self._heads(attention.k_proj(inputs)), positions, length=length)
        return keys, self._heads(attention.v_proj(inputs))

    @property
    def rope_depends_on_length(self) -> bool:
        """Whether the length of a text changes how all of its positions are rotated."""
        return self._rope.depends_on_length

    def rope_angles(self, positions: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines (rows, d / 2) in `dtype`, which rotate queries and keys at `positions` (rows,)."""
        assert not self.rope_depends_on_length
        return self._rope.angles(positions, length=len(positions), dtype=dtype)

    def next_states(self, states: Tensor, attended: Tensor) -> Tensor:
        """Finishes a step: the output projection and the MLP, each added to the residual stream.

        Args:
            states: (..., H): the states that entered the step.
            attended: (..., Q, d): what attention read.

        Returns:
            (..., H): the states for the next step; `head_states` of them is what the head reads.
        """
        layer = self.midlayer
        if self.config.norm_before_residual:
            states = layer.hidden_norm(states)
        residual: Tensor = states + layer.self_attn.o_proj(attended.flatten(-2))
        finished: Tensor = residual + layer.mlp(layer.post_attention_layernorm(residual))
        return self.norm(finished) if self.config.norm_output else finished

    def head_states(self, states: Tensor) -> Tensor:
        """Returns what the head reads of a step's `states` (..., H): their norm, unless they are normed already."""
        normed: Tensor = states if self.config.norm_output else self.norm(states)
        return normed

    def _heads(self, projected: Tensor) -> Tensor:
        heads: Tensor = projected.unflatten(-1, (-1, self.midlayer.self_attn.head_dim))
        return heads
