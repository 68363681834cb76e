"""A small GGUF file with known weights, written as llama.cpp does."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import REFERENCE

VOCABULARY = 512  # the first tokens of the reference model: reading thousands of words takes seconds
ROOMS = {  # name in GGUF, name in transformers
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def small_llama() -> LlamaForCausalLM:
    """Random weights that bfloat16 holds exactly: 2 layers, 4 query and 2 KV heads of 16."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 20_000.0},
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    for weights in model.parameters():
        weights.data = weights.data.to(torch.bfloat16).float()
    return model


def write(model: LlamaForCausalLM, file: Path, kind: str = "llama", scaled: bool = False, parts: int = 1) -> Path:
    """The model in 32 bits, with the reference model's tokenizer."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(file), kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((REFERENCE / "tokenizer.json").read_text())["model"]
    words = [*sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)[: VOCABULARY - 1], "<|endoftext|>"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges([pair for pair in merges if pair.replace(" ", "") in words])
    if parts > 1:
        writer.add_uint16("split.count", parts)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}")

    def add(name: str, weights: torch.Tensor, heads: int | None = None) -> None:
        array = weights.detach().numpy()
        if heads is not None:  # llama.cpp pairs neighbouring channels
            rows, columns = array.shape
            array = array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(name, array)

    weights = model.state_dict()
    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    add("output.weight", weights["lm_head.weight"])
    if scaled:
        add("rope_freqs.weight", torch.ones(config.head_dim // 2))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for name, theirs in ROOMS.items():
            add(f"blk.{layer}.{name}.weight", weights[f"model.layers.{layer}.{theirs}.weight"], heads.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
