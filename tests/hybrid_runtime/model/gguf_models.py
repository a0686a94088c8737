"""GGUF files as llama.cpp's and PowerInfer's converters write them, from tensors with Hugging Face's names."""

from __future__ import annotations

import gguf
import numpy as np

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.predictor.fc1": "fc1",
    "mlp.predictor.fc2": "fc2",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERT_NAMES = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}


def permute(weights, num_heads):
    """LlamaModel.permute of convert_hf_to_gguf.py: halves of a head become neighbours."""
    return (
        weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def write_gguf(
    path, config, tensors, *, arch="llama", dtype="F32", stacked=True, powerinfer=False, extra=None, also=None
):
    """config: config.json's keys. extra: metadata by key, without the architecture. also: more tensors."""
    writer = gguf.GGUFWriter(path, arch)
    _add_config(writer, arch, config)
    for key, value in (extra or {}).items():
        full_key = key if key.startswith("powerinfer.") else f"{arch}.{key}"
        writer.kv_data[0].pop(full_key, None)  # the writer refuses to say something twice
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](full_key, value)
    for name, array in (_renamed(config, tensors, arch, stacked, powerinfer) | (also or {})).items():
        kind = gguf.GGMLQuantizationType["F32" if array.ndim == 1 or "ffn_gate_inp" in name else dtype]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if powerinfer:
        path.write_bytes(b"PWRI" + path.read_bytes()[4:])
    return path


def _add_config(writer, arch, config):
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    if arch == "llama":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config.get("num_local_experts"):
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])


def _renamed(config, tensors, arch, stacked, powerinfer):
    renamed, experts = {}, {}
    for name, tensor in tensors.items():
        array = tensor.float().numpy()
        if name in NAMES:
            renamed[NAMES[name]] = array
            continue
        _, _, layer, rest = name.split(".", 3)
        module, kind = rest.rsplit(".", 1)
        if ".experts." in rest:
            _, _, expert, which = module.split(".")
            experts.setdefault((layer, EXPERT_NAMES[which]), {})[int(expert)] = array
            continue
        if module in ("self_attn.q_proj", "self_attn.k_proj") and arch != "qwen2":
            array = permute(array, config["num_attention_heads" if "q_proj" in module else "num_key_value_heads"])
        ours = LAYER_NAMES[module]
        if powerinfer and ours == "ffn_down":
            ours, array = "ffn_down_t", array.T
        renamed[f"blk.{layer}.{ours}.{kind}"] = array
    for (layer, ours), by_expert in experts.items():
        if stacked:
            renamed[f"blk.{layer}.{ours}_exps.weight"] = np.stack([by_expert[idx] for idx in sorted(by_expert)])
        else:
            renamed |= {f"blk.{layer}.{ours}.{idx}.weight": array for idx, array in by_expert.items()}
    return renamed
