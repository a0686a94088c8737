"""Forward passes of the families that transformers does not have: plain torch, written from the published descriptions.

Nothing of hybrid_runtime is imported here. A whole sequence at once, no cache, weights by their published names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

SAFE_MARGIN = 1e-5  # a hard decision nearer to its threshold could fall either way in float32
EPS = 1e-5


@dataclass(slots=True)
class Tally:
    """What the hard decisions of a pass were: neurons masked, and how near any came to the other side."""

    masked: list[torch.Tensor] = field(default_factory=list)
    margin: float = math.inf

    def decide(self, values, threshold=0.0):
        self.margin = min(self.margin, (values - threshold).abs().min().item())
        return values > threshold

    @property
    def masked_share(self):
        return 1 - torch.cat([each.flatten() for each in self.masked]).double().mean().item()


@dataclass(frozen=True, slots=True)
class Oracle:
    """ffn(layer name, layer input, residual before the norm, normed residual) -> what is added to the residual."""

    weights: dict
    ffn: Callable
    heads: int
    kv_heads: int
    num_layers: int = 3
    theta: float = 10000.0
    windows: tuple = ()  # per layer, None = all
    rotates: tuple = ()  # per layer

    def logits(self, tokens):
        w = self.weights
        x = w["model.embed_tokens.weight"].float()[tokens]
        for idx in range(self.num_layers):
            layer, layer_input = f"model.layers.{idx}", x
            x = x + self.attention(idx, rms_norm(x, w[f"{layer}.input_layernorm.weight"]))
            x = x + self.ffn(layer, layer_input, x, rms_norm(x, w[f"{layer}.post_attention_layernorm.weight"]))
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        return rms_norm(x, w["model.norm.weight"]) @ head.float().T

    def attention(self, idx, x):
        name = f"model.layers.{idx}.self_attn"
        q, k, v = (self.project(x, f"{name}.{each}_proj") for each in "qkv")
        head_dim = q.shape[1] // self.heads
        distance = torch.arange(len(x))[:, None] - torch.arange(len(x))[None, :]
        window = (self.windows or (None,) * self.num_layers)[idx]
        hidden = (distance < 0) | (distance >= (window or len(x)))
        outputs = []
        for head in range(self.heads):
            kv_head = head // (self.heads // self.kv_heads)
            q_h, k_h, v_h = (
                each[:, at * head_dim : (at + 1) * head_dim] for each, at in ((q, head), (k, kv_head), (v, kv_head))
            )
            if not self.rotates or self.rotates[idx]:
                q_h, k_h = rotate(q_h, self.theta), rotate(k_h, self.theta)
            scores = (q_h @ k_h.T / head_dim**0.5).masked_fill(hidden, -math.inf)
            outputs.append(scores.softmax(-1) @ v_h)
        return torch.cat(outputs, dim=1) @ self.weights[f"{name}.o_proj.weight"].float().T

    def project(self, x, name):
        bias = self.weights.get(f"{name}.bias")
        return x @ self.weights[f"{name}.weight"].float().T + (0 if bias is None else bias.float())


def rms_norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.float()


def rotate(x, theta):
    """Column d with column d + D/2 as a complex number, turned by position * theta^(-2d/D)."""
    half = x.shape[1] // 2
    angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) / half)[None, :]
    turned = torch.complex(x[:, :half].contiguous(), x[:, half:].contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat((turned.real, turned.imag), dim=1)


def glu(w, name, x, act, names=("gate_proj", "up_proj", "down_proj"), mask=1.0):
    gate, up, down = (w[f"{name}.{each}.weight"].float() for each in names)
    return (act(x @ gate.T, x @ up.T) * mask) @ down.T


def drelu(gate, up):
    return gate.clamp(min=0) * up.clamp(min=0)


def relu_glu(gate, up):
    return gate.clamp(min=0) * up


def predictor_mask(w, name, p, tally, threshold=0.0, *, at_threshold=False):
    """m = round(sigmoid(fc2(relu(fc1(p))))); PowerInfer computes a neuron at its threshold too."""
    narrow = p @ w[f"{name}.predictor.fc1.weight"].float().T
    z = narrow.clamp(min=0) @ w[f"{name}.predictor.fc2.weight"].float().T
    silent = (narrow <= 0).all(dim=1)  # then every z is exactly 0, and the decision fell before fc2
    fires = z >= threshold if at_threshold else z > threshold
    for values in (z[~silent] - threshold, narrow[silent].amax(dim=1)):
        if len(values):
            tally.decide(values)
    tally.masked.append(fires)
    if threshold == 0.0 and not at_threshold:
        assert torch.equal(torch.round(torch.sigmoid(z)), fires.float())
    return fires.float()


def dense_ffn(w, act, tally=None, *, predictor_input="pre_norm", threshold=0.0, at_threshold=False):
    """tally: where there is a predictor and it masks."""

    def ffn(layer, _, residual, x):
        p = residual if predictor_input == "pre_norm" else x
        mask = (
            1.0 if tally is None else predictor_mask(w, f"{layer}.mlp", p, tally, threshold, at_threshold=at_threshold)
        )
        return glu(w, f"{layer}.mlp", x, act, mask=mask)

    return ffn


def turbosparse_mixtral_ffn(w, num_experts, top_k, tally=None, *, predictor_input="post_norm"):
    """Softmax over all experts, the best k, renormalised; each expert masked by its own predictor on the same x."""

    def ffn(layer, _, residual, x):
        moe = f"{layer}.block_sparse_moe"
        p = x if predictor_input == "post_norm" else residual
        scores = (x @ w[f"{moe}.gate.weight"].float().T).softmax(-1)
        output = torch.zeros_like(x)
        for token in range(len(x)):
            chosen = scores[token].sort(descending=True).indices[:top_k].tolist()
            total = sum(scores[token, expert] for expert in chosen)
            for expert in chosen:
                name, row = f"{moe}.experts.{expert}", slice(token, token + 1)
                mask = 1.0 if tally is None else predictor_mask(w, name, p[row], tally)
                part = glu(w, name, x[row], drelu, ("w1", "w3", "w2"), mask)
                output[token] += scores[token, expert] / total * part[0]
        assert num_experts == scores.shape[1]
        return output

    return ffn


def smallthinker_ffn(w, top_k, *, softmax=False, normalize=True, router_input="layer_input"):
    """The router reads the layer's raw input; the best k logits, sigmoid (or softmax) of those, renormalised."""

    def ffn(layer, layer_input, residual, x):
        moe = f"{layer}.block_sparse_moe"
        read = {"layer_input": layer_input, "pre_norm": residual, "post_norm": x}[router_input]
        logits, chosen = (read @ w[f"{moe}.primary_router.weight"].float().T).topk(top_k)
        scores = logits.softmax(-1) if softmax else 1 / (1 + (-logits).exp())
        if normalize:
            scores = scores / scores.sum(-1, keepdim=True)
        output = torch.zeros_like(x)
        for token in range(len(x)):
            for slot in range(top_k):
                name = f"{moe}.experts.{chosen[token, slot].item()}"
                part = glu(w, name, x[token : token + 1], relu_glu, ("gate", "up", "down"))
                output[token] += scores[token, slot] * part[0]
        return output

    return ffn
