"""NumPy statements of the definitions: slow, float64, one row at a time.

Nothing here is shared with the package; loops are preferred to tricks.
"""

import itertools

import numpy as np


def boundary_posterior(confidence):
  """r(i) = c_1 * ... * c_i * (1 - c_{i+1}) of one row."""
  posterior = []
  for i, failing in enumerate(confidence):
    reached = 1.0
    for c in confidence[:i]:
      reached *= float(c)
    posterior.append(reached * (1.0 - float(failing)))
  return np.array(posterior)


def select_prefixes(posterior, num_branches):
  """The likeliest i first, the smaller i among equals."""
  order = sorted(range(len(posterior)), key=lambda i: (-posterior[i], i))
  return order[:num_branches]


def candidate_paths(trunk, branches, prefix_lengths):
  """Every root-to-node token path of the K+1 candidate rows."""
  rows = [list(trunk)]
  for branch, shared in zip(branches, prefix_lengths, strict=True):
    rows.append(list(trunk[: shared + 1]) + list(branch[shared + 1 :]))
  return {tuple(r[: n + 1]) for r in rows for n in range(len(r))}


def node_path(parents, node):
  """Nodes from the root down to `node`."""
  path = [int(node)]
  while parents[path[0]] >= 0:
    path.insert(0, int(parents[path[0]]))
  return path


def ancestors(parents):
  """mask[i, j]: j is i or lies above it."""
  mask = np.zeros((len(parents), len(parents)), bool)
  for i in range(len(parents)):
    mask[i, node_path(parents, i)] = True
  return mask


def longest_accepted(tokens, parents, valid, choices):
  """The deepest path the target agrees with, the lowest end among equals."""
  best = [0]
  for node in range(len(tokens)):
    path = node_path(parents, node)
    agreed = all(
      valid[child] and tokens[child] == choices[parent]
      for parent, child in itertools.pairwise(path)
    )
    if path[0] == 0 and agreed and len(path) > len(best):
      best = path
  return best


def filter_logits(logits, top_k, top_p):
  """Top-k, then top-p of what is left, by sorting one row."""
  logits = np.asarray(logits, np.float64)
  kept = np.ones(len(logits), bool)
  if top_k > 0:
    kept = logits >= np.sort(logits)[::-1][min(top_k, len(logits)) - 1]
  if top_p < 1:
    mass = np.where(kept, np.exp(logits - logits.max()), 0)
    mass = mass / mass.sum()
    order = np.argsort(-mass, kind="stable")
    last = np.searchsorted(np.cumsum(mass[order]), top_p)
    edge = logits[order[min(last, kept.sum() - 1)]]
    kept &= logits >= edge
  return np.where(kept, logits, -np.inf)


def cascade_attention(
  query,
  prefix_keys,
  prefix_values,
  local_keys,
  local_values,
  *,
  prefix_end,
  prefix_start=None,
  local_mask=None,
  sinks=None,
):
  """One softmax per node and head over exactly the keys it sees."""
  batch, groups, nodes, heads, head_dim = query.shape
  share = heads // local_keys.shape[3]
  output = np.zeros(query.shape)
  for b, g, i, n in np.ndindex(batch, groups, nodes, heads):
    end = prefix_end[b] if np.ndim(prefix_end) == 1 else prefix_end[b, g]
    start = 0 if prefix_start is None else prefix_start[b, g, i]
    rows = [s for s in range(prefix_keys.shape[2]) if start <= s < end]
    near = list(range(nodes))
    if local_mask is not None:
      shape = (batch, groups, nodes, nodes)
      near = np.flatnonzero(np.broadcast_to(local_mask, shape)[b, g, i])
    j = n // share
    keys = np.concatenate([prefix_keys[b, j, rows], local_keys[b, g, near, j]])
    values = np.concatenate(
      [prefix_values[b, j, rows], local_values[b, g, near, j]]
    )
    scores = keys.astype(np.float64) @ query[b, g, i, n].astype(np.float64)
    scores = scores / np.sqrt(head_dim)
    extra = [] if sinks is None else [float(sinks[n])]
    if not len(scores):
      continue
    top = max([*scores, *extra])
    weights = np.exp(scores - top)
    total = weights.sum() + sum(np.exp(e - top) for e in extra)
    output[b, g, i, n] = weights @ values.astype(np.float64) / total
  return output


def rms_norm(x, weight, eps):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def frequencies(theta, half, scaling=None):
  """Radians per position of each pair, wave by wave."""
  kind, out = type(scaling).__name__, []
  for pair in range(half):
    plain = theta ** (-pair / half)
    wave = 2 * np.pi / plain
    share = 0.0  # of the frequency divided by the factor
    if kind == "LinearScaling":
      share = 1.0
    elif kind == "Llama3Scaling":
      longest = scaling.original_length / scaling.low_freq_factor
      shortest = scaling.original_length / scaling.high_freq_factor
      if wave > longest:
        share = 1.0
      elif wave >= shortest:
        turns = scaling.original_length / wave
        share = 1 - (turns - scaling.low_freq_factor) / (
          scaling.high_freq_factor - scaling.low_freq_factor
        )
    elif kind == "YarnScaling":
      low, high = (
        half * np.log(scaling.original_length / (2 * np.pi * b)) / np.log(theta)
        for b in (scaling.beta_fast, scaling.beta_slow)
      )
      if scaling.truncate:
        low, high = np.floor(low), np.ceil(high)
      low, high = max(low, 0), min(high, 2 * half - 1)
      share = min(max((pair - low) / (high - low), 0.0), 1.0)
    factor = scaling.factor if scaling is not None else 1.0
    out.append(plain * (1 - share) + plain / factor * share)
  return out


def rotate(x, positions, theta, scaling=None):
  """Rotate-half RoPE of [T, heads, H] by explicit 2x2 rotations."""
  half = x.shape[-1] // 2
  out = np.empty_like(x)
  stretch = scaling.attention_factor if scaling is not None else 1.0
  for pair, frequency in enumerate(frequencies(theta, half, scaling)):
    angle = np.asarray(positions) * frequency
    cos, sin = (stretch * f(angle)[:, None] for f in (np.cos, np.sin))
    a, b = x[..., pair], x[..., pair + half]
    out[..., pair], out[..., pair + half] = a * cos - b * sin, b * cos + a * sin
  return out


def mxfp4(blocks, scales):
  """Values of MXFP4 rows, code by code, as the OCP format defines them."""
  out = np.zeros((*scales.shape, 32))
  for at in np.ndindex(blocks.shape):
    byte = int(blocks[at])
    for i, code in enumerate((byte % 16, byte // 16)):
      exponent, mantissa = code // 2 % 4, code % 2
      value = (
        (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        if exponent
        else (mantissa / 2)
      )
      sign = -1 if code >= 8 else 1
      power = 2.0 ** (int(scales[at[:-1]]) - 127)
      out[(*at[:-1], 2 * at[-1] + i)] = sign * value * power
  return out.reshape(*scales.shape[:-1], -1)


def unpack_experts(tensors):
  """Experts' matrices `[E, in, out]` in the place of MXFP4 codes."""
  out = {k: v for k, v in tensors.items() if not k.endswith("_scales")}
  for name in [k for k in out if k.endswith("_blocks")]:
    stem = name.removesuffix("_blocks")
    values = mxfp4(out.pop(name), tensors[f"{stem}_scales"])
    out[stem] = values.swapaxes(1, 2)
  return out


class Transformer:
  """Layers under Hugging Face names, `[out, in]`, behind a name prefix."""

  def __init__(self, tensors, config, prefix=""):
    self.tensors = {k: np.asarray(v, np.float64) for k, v in tensors.items()}
    self.config = config
    self.prefix = prefix
    # How much better the last chosen expert of any token was than the next.
    self.router_margin = np.inf

  def weight(self, name):
    return self.tensors[f"{self.prefix}{name}.weight"]

  def project(self, name, x):
    """With the bias where there is one."""
    bias = self.tensors.get(f"{self.prefix}{name}.bias", 0.0)
    return x @ self.weight(name).T + bias

  def project_kv(self, layer, x, positions):
    """Normed and rotated keys, plain values: `[T, J, H]`."""
    c, at = self.config, f"layers.{layer}.self_attn."
    keys, values = (
      self.project(at + name, x).reshape(len(x), -1, c.head_dim)
      for name in ("k_proj", "v_proj")
    )
    return self._norm_rotate(at + "k_norm", keys, positions), values

  def _norm_rotate(self, name, x, positions):
    c = self.config
    if f"{self.prefix}{name}.weight" in self.tensors:
      x = rms_norm(x, self.weight(name), c.rms_norm_eps)
    return rotate(x, positions, c.rope_theta, c.rope_scaling)

  def layer(self, i, x, positions, context, mask):
    """One layer of `x` behind `context` (keys, values), which all see."""
    c, at = self.config, f"layers.{i}."
    h = rms_norm(x, self.weight(at + "input_layernorm"), c.rms_norm_eps)
    query = self.project(at + "self_attn.q_proj", h)
    query = query.reshape(len(x), -1, c.head_dim)
    query = self._norm_rotate(at + "self_attn.q_norm", query, positions)
    own = self.project_kv(i, h, positions)
    keys, values = (np.concatenate(p) for p in zip(context, own, strict=True))
    seen = np.concatenate(
      [np.ones((len(x), len(context[0])), bool), mask], axis=1
    )
    share = query.shape[1] // keys.shape[1]
    sinks = self.tensors.get(f"{self.prefix}{at}self_attn.sinks")
    out = np.zeros_like(query)
    for n in range(query.shape[1]):
      scores = query[:, n] @ keys[:, n // share].T / np.sqrt(c.head_dim)
      scores = np.where(seen, scores, -np.inf)
      if sinks is not None:
        sink = np.full((len(x), 1), sinks[n])
        scores = np.concatenate([scores, sink], axis=1)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      out[:, n] = weights[:, : len(keys)] @ values[:, n // share]
    x = x + self.project(at + "self_attn.o_proj", out.reshape(len(x), -1))
    h = rms_norm(
      x, self.weight(at + "post_attention_layernorm"), c.rms_norm_eps
    )
    if f"{self.prefix}{at}mlp.router.weight" in self.tensors:
      return x + self.experts(at + "mlp.", h)
    gate = h @ self.weight(at + "mlp.gate_proj").T
    up = h @ self.weight(at + "mlp.up_proj").T
    gated = gate / (1 + np.exp(-gate)) * up
    return x + gated @ self.weight(at + "mlp.down_proj").T

  def experts(self, at, x):
    """Token by token, expert by expert; columns of gate and up alternate."""
    c, out = self.config, np.zeros_like(x)
    named = lambda name: self.tensors[f"{self.prefix}{at}experts.{name}"]
    scores = self.project(at + "router", x)
    for t, row in enumerate(x):
      order = np.argsort(-scores[t], kind="stable")
      chosen = order[: c.experts_per_token]
      margin = scores[t, chosen[-1]] - scores[t, order[c.experts_per_token]]
      self.router_margin = min(self.router_margin, margin)
      shares = np.exp(scores[t, chosen] - scores[t, chosen].max())
      for e, share in zip(chosen, shares / shares.sum(), strict=True):
        both = row @ named("gate_up_proj")[e] + named("gate_up_proj_bias")[e]
        gate = np.minimum(both[::2], c.swiglu_limit)
        up = np.clip(both[1::2], -c.swiglu_limit, c.swiglu_limit)
        hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
        out[t] += share * (
          hidden @ named("down_proj")[e] + named("down_proj_bias")[e]
        )
    return out


def target_forward(tensors, config, tokens):
  """Causal forward: logits `[T, V]`, outputs of each layer `[L, T, D]`."""
  return target_pass(tensors, config, tokens)[:2]


def target_pass(tensors, config, tokens):
  """`target_forward`, and the smallest margin of all choices of experts."""
  tensors = unpack_experts(tensors)
  model = Transformer(tensors, config, "model.")
  x = model.weight("embed_tokens")[np.asarray(tokens)]
  empty = np.zeros((0, config.num_kv_heads, config.head_dim))
  causal = np.tri(len(x), dtype=bool)
  hidden = []
  back = np.arange(len(x))[:, None] - np.arange(len(x))
  for i in range(config.num_layers):
    near = back < (config.window(i) or len(x))
    x = model.layer(i, x, np.arange(len(x)), (empty, empty), causal & near)
    hidden.append(x)
  x = rms_norm(x, model.weight("norm"), config.rms_norm_eps)
  head = model.tensors.get("lm_head.weight", model.weight("embed_tokens"))
  return x @ head.T, np.stack(hidden), model.router_margin


def branch_logits(tensors, config, context, tokens, parents):
  """Logits at each node from one causal forward per root-to-node path."""
  rows = []
  for node in range(len(tokens)):
    path = [int(tokens[i]) for i in node_path(parents, node)]
    rows.append(target_forward(tensors, config, [*context, *path])[0][-1])
  return np.stack(rows)


def drafter_context(tensors, config, features):
  """The drafter's keys and values per layer of features `[n, taps, D]`."""
  model = Transformer(tensors, config)
  x = features.reshape(len(features), -1) @ model.weight("fc").T
  x = rms_norm(x, model.weight("hidden_norm"), config.rms_norm_eps)
  positions = np.arange(len(x))
  return [model.project_kv(i, x, positions) for i in range(config.num_layers)]


def drafter_forward(tensors, config, features, embeddings):
  """Block slots `[γ, D]` behind the features of all tokens before them."""
  model = Transformer(tensors, config)
  context = drafter_context(tensors, config, features)
  x = np.asarray(embeddings, np.float64)
  positions = len(features) + np.arange(len(x))
  both_ways = np.ones((len(x), len(x)), bool)
  for i in range(config.num_layers):
    x = model.layer(i, x, positions, context[i], both_ways)
  return rms_norm(x, model.weight("norm"), config.rms_norm_eps)


def cut_periodic_tail(tokens):
  """The definition: for every period, count from the end while it repeats."""
  longest = 0
  for period in range(1, len(tokens) // 3 + 1):
    m = 0
    while (
      m < len(tokens) - period and tokens[-1 - m] == tokens[-1 - m - period]
    ):
      m += 1
    if m >= 2 * period and m >= 24:
      longest = max(longest, m)
  return tokens[: len(tokens) - longest]
