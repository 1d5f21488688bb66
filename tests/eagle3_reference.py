"""The training-time test of EAGLE-3 written out row by row in float64: slow, obvious, and without code of `eagle3`.

Weights come under their names on disk. Nothing is pruned: every row that has a token runs every step that has one.
"""

from dataclasses import dataclass, field

import torch


@dataclass
class Reference:
    """Sums over all supervised pairs, and counts per step."""

    loss_sum: torch.Tensor
    weight_sum: float
    supervised: list[int] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    chain_rows: list[int] = field(default_factory=list)
    chain_hits: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Shape:
    """What the weights do not say about the draft."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    rope_theta: float
    norm_before_residual: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False


def reference(
    weights,
    shape,
    *,
    input_ids,
    loss_mask,
    aux,
    hidden,
    head,
    num_steps,
    decay,
    loss="soft_cross_entropy",
    lk_decay=3.0,
) -> Reference:
    total = Reference(torch.zeros((), dtype=torch.float64), 0.0, *([0] * num_steps for _ in range(4)))
    for sequence in zip(input_ids.tolist(), loss_mask.tolist(), aux, hidden, strict=True):
        _sequence(total, weights, shape, *sequence, head=head, num_steps=num_steps, decay=decay, loss=(loss, lk_decay))
    return total


def _sequence(total, weights, shape, ids, mask, aux, hidden, *, head, num_steps, decay, loss):
    num_rows = len(ids) - 1
    start = [_fuse(weights, shape, aux[t]) for t in range(num_rows)]
    first = [_qkv(weights, shape, ids[t + 1], start[t], position=t) for t in range(num_rows)]
    target_ids = [j + int(offset) for j, offset in enumerate(weights["d2t"])]
    for t in range(num_rows):
        state, own = start[t], []
        prefix_supervised = prefix_hit = True
        for step in range(num_steps):
            c = t + 1 + step
            if c >= len(ids):
                break
            queries, keys, values = _qkv(weights, shape, ids[c], state, position=t + step)
            if step > 0:
                own.append((keys, values))
            seen = [(first[s][1], first[s][2]) for s in range(t + 1)] + own
            state = _finish(weights, shape, state, _attend(shape, queries, seen))
            normed = _norm(state, weights["norm.weight"], shape.eps)
            z = weights["lm_head.weight"] @ normed
            state = normed if shape.norm_output else state
            full = head @ hidden[c]
            greedy = int(full.argmax())
            hit = mask[c] and greedy in target_ids and target_ids[int(z.argmax())] == greedy
            if mask[c] and greedy in target_ids:
                total.loss_sum = total.loss_sum + decay**step * _pair_loss(full, target_ids, z, *loss)
                total.weight_sum += decay**step
            prefix_supervised = prefix_supervised and bool(mask[c])
            prefix_hit = prefix_hit and bool(hit)
            total.supervised[step] += bool(mask[c])
            total.hits[step] += bool(hit)
            total.chain_rows[step] += prefix_supervised
            total.chain_hits[step] += prefix_hit


def _pair_loss(full, target_ids, z, loss, lk_decay):
    log_q = _log_softmax(z)
    log_p = _log_softmax(full[target_ids])
    p = torch.exp(log_p)
    if loss == "soft_cross_entropy":
        return -sum(p[j] * log_q[j] for j in range(len(p)))
    true_p = torch.exp(_log_softmax(full))[target_ids]
    acceptance = sum(torch.minimum(true_p[j], torch.exp(log_q[j])) for j in range(len(p)))
    if loss == "lk_alpha":
        return -torch.log(acceptance)
    assert loss == "lk_lambda"
    w = torch.exp(-lk_decay * acceptance.detach())
    divergence = sum(p[j] * (log_p[j] - log_q[j]) for j in range(len(p)))
    return w * divergence + (1 - w) * (1 - acceptance)


def _fuse(weights, shape, aux):
    if shape.fc_norm:
        thirds = aux.split(len(aux) // 3)
        aux = torch.cat([_norm(thirds[n], weights[f"fc_norm.{n}.weight"], shape.eps) for n in range(3)])
    if shape.norm_before_fc:
        aux = _norm(aux, weights["input_norm.weight"], shape.eps)
    return weights["fc.weight"] @ aux


def _qkv(weights, shape, token, state, *, position):
    embedding = weights["embed_tokens.weight"][token]
    u = torch.cat(
        (
            _norm(embedding, weights["midlayer.input_layernorm.weight"], shape.eps),
            _norm(state, weights["midlayer.hidden_norm.weight"], shape.eps),
        )
    )
    q, k, v = (weights[f"midlayer.self_attn.{name}_proj.weight"] @ u for name in "qkv")
    d = shape.head_dim
    queries = [_rotate(q[n * d : (n + 1) * d], position, shape) for n in range(shape.num_heads)]
    keys = [_rotate(k[n * d : (n + 1) * d], position, shape) for n in range(shape.num_kv_heads)]
    values = [v[n * d : (n + 1) * d] for n in range(shape.num_kv_heads)]
    return queries, keys, values


def _attend(shape, queries, seen):
    heads = []
    for n, q in enumerate(queries):
        shared = n // (shape.num_heads // shape.num_kv_heads)
        scores = torch.stack([q @ keys[shared] / shape.head_dim**0.5 for keys, _ in seen])
        share = torch.exp(_log_softmax(scores))
        heads.append(sum(share[s] * values[shared] for s, (_, values) in enumerate(seen)))
    return torch.cat(heads)


def _finish(weights, shape, state, attended):
    if shape.norm_before_residual:
        state = _norm(state, weights["midlayer.hidden_norm.weight"], shape.eps)
    x = state + weights["midlayer.self_attn.o_proj.weight"] @ attended
    y = _norm(x, weights["midlayer.post_attention_layernorm.weight"], shape.eps)
    gate, up = weights["midlayer.mlp.gate_proj.weight"] @ y, weights["midlayer.mlp.up_proj.weight"] @ y
    return x + weights["midlayer.mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def _norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def _rotate(x, position, shape):
    half = shape.head_dim // 2
    # transformers keeps the frequencies in float32, so a float64 draft has those.
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = position * (1.0 / shape.rope_theta**exponents).double()
    cos, sin = torch.cos(angles), torch.sin(angles)
    return torch.cat((x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin))


def _log_softmax(z):
    return z - torch.log(torch.exp(z - z.max().detach()).sum()) - z.max().detach()
