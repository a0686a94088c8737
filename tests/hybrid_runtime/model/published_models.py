"""Tiny checkpoints with the published configs and tensor names of the families that transformers does not have."""

from __future__ import annotations

from .tiny_models import attention_shapes, random_tensors

HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 36, 51, 3, 6, 2, 6, 97
RANKS = (5, 9, 3)  # real checkpoints differ from layer to layer, and say so nowhere but in the shapes
EXPERTS, TOP_K = 5, 2

SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
TURBOSPARSE_MISTRAL = SIZES | {
    "architectures": ["BambooForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_bamboo.BambooConfig",
        "AutoModelForCausalLM": "modeling_bamboo.BambooForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "relu",
    "initializer_range": 0.02,
    "intermediate_size": INTER,
    "model_type": "bamboo",
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
}
TURBOSPARSE_MIXTRAL = TURBOSPARSE_MISTRAL | {
    "architectures": ["TurboSparseMixtralForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_turbosparsemixtral.TurboSparseMixtralConfig",
        "AutoModelForCausalLM": "modeling_turbosparsemixtral.TurboSparseMixtralForCausalLM",
    },
    "model_type": "turbosparsemixtral",
    "num_experts_per_tok": TOP_K,
    "num_local_experts": EXPERTS,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
}
SPARSE_LLAMA = SIZES | {
    "architectures": ["SparseLlamaForCausalLM"],
    "model_type": "sparsellama",
    "hidden_act": "fatrelu",
    "hidden_act_param": 0.01,
    "intermediate_size": INTER,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
SPARSE_QWEN2 = SIZES | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "relu",
    "intermediate_size": INTER,
    "rope_theta": 10000.0,
    "sliding_window": 131072,
    "max_window_layers": 28,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
SMALLTHINKER = SIZES | {
    "architectures": ["SmallThinkerForCausalLM"],
    "model_type": "smallthinker",
    "head_dim": 10,
    "num_attention_heads": 4,
    "moe_ffn_hidden_size": INTER,
    "moe_num_primary_experts": EXPERTS,
    "moe_num_active_primary_experts": TOP_K,
    "moe_primary_router_apply_softmax": False,
    "norm_topk_prob": True,
    "rope_layout": [1, 0, 1],
    "rope_scaling": None,
    "rope_theta": 1500000.0,
    "sliding_window_layout": [1, 0, 0],
    "sliding_window_size": 5,
    "tie_word_embeddings": True,
}


def dense_tensors(ranks=(), qkv_bias=False, shift=0.0, seed=0):
    """Llama's names; ranks: of the predictors of each layer; shift: how far their logits lie below zero."""
    shapes = _outer_shapes()
    for idx in range(LAYERS):
        layer = f"model.layers.{idx}"
        shapes |= attention_shapes(layer, HIDDEN, HEADS, KV_HEADS, HEAD_DIM)
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (INTER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, INTER)
        if qkv_bias:
            rows = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
            shapes |= {f"{layer}.self_attn.{name}_proj.bias": (rows[name] * HEAD_DIM,) for name in rows}
        if ranks:
            shapes |= _predictor_shapes(f"{layer}.mlp", ranks[idx])
    return _shifted(random_tensors(shapes, seed), shift)


def turbosparse_mixtral_tensors(ranks=RANKS, shift=0.0, seed=0):
    shapes = _outer_shapes()
    for idx in range(LAYERS):
        layer = f"model.layers.{idx}"
        shapes |= attention_shapes(layer, HIDDEN, HEADS, KV_HEADS, HEAD_DIM)
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            name = f"{layer}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{name}.w1.weight": (INTER, HIDDEN), f"{name}.w3.weight": (INTER, HIDDEN)}
            shapes[f"{name}.w2.weight"] = (HIDDEN, INTER)
            shapes |= _predictor_shapes(name, ranks[idx])
    return _shifted(random_tensors(shapes, seed), shift)


def smallthinker_tensors(*, tied=True, head_dim=10):
    shapes = _outer_shapes()
    if tied:
        del shapes["lm_head.weight"]
    for idx in range(LAYERS):
        layer = f"model.layers.{idx}"
        shapes |= attention_shapes(layer, HIDDEN, 4, KV_HEADS, head_dim)
        shapes[f"{layer}.block_sparse_moe.primary_router.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            name = f"{layer}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{name}.gate.weight": (INTER, HIDDEN), f"{name}.up.weight": (INTER, HIDDEN)}
            shapes[f"{name}.down.weight"] = (HIDDEN, INTER)
    return random_tensors(shapes)


def _outer_shapes():
    return {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }


def _predictor_shapes(ffn, rank):
    return {f"{ffn}.predictor.fc1.weight": (rank, HIDDEN), f"{ffn}.predictor.fc2.weight": (INTER, rank)}


def _shifted(tensors, shift):
    for name, tensor in tensors.items():
        if name.endswith("predictor.fc2.weight"):
            tensor.sub_(shift / tensor.shape[1] ** 0.5)
    return tensors
