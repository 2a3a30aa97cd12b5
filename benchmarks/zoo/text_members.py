"""The zoo's text transformers: decoders, encoders, encoder-decoders, mixtures of experts, state-space models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from member import Member

Config = Mapping[str, Any]


def _member(family: str, model_type: str, architecture: str, config: Config, small: Config, **rest: Any) -> Member:
    name = rest.pop("name", model_type.replace("_", "-"))
    return Member(name, family, "transformers", model_type, architecture, config=config, small=small, **rest)


def _decoder(model_type: str, architecture: str, small: Config | None = None, **rest: Any) -> Member:
    return _member("decoder", model_type, architecture, rest.pop("config", {}), small or {}, **rest)


def _experts(model_type: str, architecture: str, small: Config | None = None, **rest: Any) -> Member:
    return _member("mixture of experts", model_type, architecture, rest.pop("config", {}), small or {}, **rest)


def _state_space(model_type: str, architecture: str, small: Config | None = None, **rest: Any) -> Member:
    return _member("state space", model_type, architecture, rest.pop("config", {}), small or {}, **rest)


def _encoder(model_type: str, architecture: str, small: Config | None = None, **rest: Any) -> Member:
    return _member("encoder", model_type, architecture, rest.pop("config", {}), small or {}, **rest)


def _seq2seq(model_type: str, architecture: str, small: Config | None = None, **rest: Any) -> Member:
    return _member("encoder-decoder", model_type, architecture, rest.pop("config", {}), small or {}, **rest)


_FEW_EXPERTS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
}

# Loops over time steps: sequences of 1024, and torch counts the small variant (it does not fold the loop).
_STEPS: Mapping[str, Any] = {"seq": 1024, "oracle_small": True}

MEMBERS: tuple[Member, ...] = (
    # multi-head, grouped-query and multi-query attention; parallel blocks; ALiBi, rotary, learned positions
    _decoder("gpt2", "GPT2LMHeadModel"),
    _decoder(
        "gpt2",
        "GPT2LMHeadModel",
        name="gpt3-175b",
        config={"n_layer": 96, "n_embd": 12288, "n_head": 96, "n_positions": 2048, "n_ctx": 2048},
        executed=False,
        why_not="the same code as gpt2",
    ),
    _decoder("gpt_neo", "GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 2]], "window_size": 8}),
    _decoder("gpt_neox", "GPTNeoXForCausalLM"),
    _decoder("gptj", "GPTJForCausalLM", {"rotary_dim": 4}),
    _decoder("gpt_bigcode", "GPTBigCodeForCausalLM"),
    _decoder("opt", "OPTForCausalLM"),
    _decoder("bloom", "BloomForCausalLM", config={"hidden_size": 4096, "n_layer": 30, "n_head": 32}),
    _decoder("falcon", "FalconForCausalLM"),
    _decoder("mpt", "MptForCausalLM", config={"d_model": 4096, "n_heads": 32, "n_layers": 32}),
    _decoder("llama", "LlamaForCausalLM"),
    _decoder(
        "llama",
        "LlamaForCausalLM",
        name="llama3-405b",
        config={
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
        executed=False,
        why_not="the same code as llama",
    ),
    _decoder("mistral", "MistralForCausalLM", {"sliding_window": 8}),
    _decoder("qwen2", "Qwen2ForCausalLM"),
    _decoder("qwen3", "Qwen3ForCausalLM"),
    _decoder("gemma", "GemmaForCausalLM"),
    _decoder("gemma2", "Gemma2ForCausalLM", {"sliding_window": 8}),
    _decoder("gemma3_text", "Gemma3ForCausalLM", {"sliding_window": 8, "sliding_window_pattern": 2}),
    _decoder("phi", "PhiForCausalLM"),
    _decoder("phi3", "Phi3ForCausalLM"),
    _decoder("cohere", "CohereForCausalLM"),
    _decoder("cohere2", "Cohere2ForCausalLM", {"sliding_window": 8, "layer_types": None}),
    _decoder("stablelm", "StableLmForCausalLM"),
    _decoder("starcoder2", "Starcoder2ForCausalLM"),
    _decoder("codegen", "CodeGenForCausalLM", {"rotary_dim": 4}),
    _decoder("persimmon", "PersimmonForCausalLM"),
    _decoder("granite", "GraniteForCausalLM"),
    _decoder("olmo2", "Olmo2ForCausalLM"),
    _decoder("glm4", "Glm4ForCausalLM"),
    _decoder("smollm3", "SmolLM3ForCausalLM"),
    _decoder("exaone4", "Exaone4ForCausalLM", {"sliding_window": 8}),
    # experts; multi-head latent attention
    _experts("mixtral", "MixtralForCausalLM", _FEW_EXPERTS),
    _experts("qwen2_moe", "Qwen2MoeForCausalLM", {**_FEW_EXPERTS, "shared_expert_intermediate_size": 32}),
    _experts("qwen3_moe", "Qwen3MoeForCausalLM", _FEW_EXPERTS),
    _experts("phimoe", "PhimoeForCausalLM", {**_FEW_EXPERTS, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}),
    _experts("granitemoe", "GraniteMoeForCausalLM", _FEW_EXPERTS),
    _experts("olmoe", "OlmoeForCausalLM", _FEW_EXPERTS),
    _experts(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {
            **_FEW_EXPERTS,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "qk_head_dim": 12,
            "v_head_dim": 8,
            "head_dim": 4,
        },
    ),
    _experts("glm4_moe", "Glm4MoeForCausalLM", {**_FEW_EXPERTS, "num_experts_per_tok": 2, "n_group": 1}),
    _experts("gpt_oss", "GptOssForCausalLM", {**_FEW_EXPERTS, "num_experts_per_tok": 2, "sliding_window": 8}),
    _experts("llama4_text", "Llama4ForCausalLM", {**_FEW_EXPERTS, "intermediate_size_mlp": 64}),
    # state spaces, linear attention, hybrids
    _state_space("mamba", "MambaForCausalLM", {"state_size": 4, "time_step_rank": 4}, **_STEPS),
    _state_space(
        "mamba2", "Mamba2ForCausalLM", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8}
    ),
    _state_space("falcon_mamba", "FalconMambaForCausalLM", {"state_size": 4, "time_step_rank": 4}, **_STEPS),
    _state_space(
        "jamba",
        "JambaForCausalLM",
        {**_FEW_EXPERTS, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
        **_STEPS,
    ),
    _state_space(
        "bamba",
        "BambaForCausalLM",
        {
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 2,
            "mamba_chunk_size": 8,
            "attn_layer_indices": [1, 3],
        },
    ),
    _state_space("rwkv", "RwkvForCausalLM", {"attention_hidden_size": 32, "context_length": 64}, **_STEPS),
    _state_space(
        "recurrent_gemma", "RecurrentGemmaForCausalLM", {"lru_width": 32, "attention_window_size": 8}, **_STEPS
    ),
    _state_space(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {
            **_FEW_EXPERTS,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    _state_space("lfm2", "Lfm2ForCausalLM"),
    # encoders
    _encoder("bert", "BertForMaskedLM"),
    _encoder("roberta", "RobertaForMaskedLM", {"max_position_embeddings": 66}),
    _encoder("albert", "AlbertForMaskedLM"),
    _encoder("deberta-v2", "DebertaV2ForMaskedLM"),
    _encoder("electra", "ElectraForMaskedLM"),
    _encoder("modernbert", "ModernBertForMaskedLM", {"local_attention": 8}),
    _encoder("distilbert", "DistilBertForMaskedLM", {"hidden_dim": 64}),
    _encoder("longformer", "LongformerForMaskedLM", {"attention_window": 4}),
    _encoder("xlnet", "XLNetLMHeadModel"),
    _encoder("mpnet", "MPNetForMaskedLM", {"max_position_embeddings": 66}),
    _encoder("fnet", "FNetForMaskedLM", precision="fp32"),
    _encoder("funnel", "FunnelForMaskedLM", {"block_sizes": [2, 2], "d_head": 8, "d_inner": 64}),
    # encoder-decoders
    _seq2seq("t5", "T5ForConditionalGeneration", config={"decoder_start_token_id": 0}),
    _seq2seq("mt5", "MT5ForConditionalGeneration", config={"decoder_start_token_id": 0}),
    _seq2seq("bart", "BartForConditionalGeneration"),
    _seq2seq("pegasus", "PegasusForConditionalGeneration"),
    _seq2seq("m2m_100", "M2M100ForConditionalGeneration"),
    _seq2seq(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        {"num_experts": 4, "expert_capacity": 16, "router_jitter_noise": 0.0},
        config={"decoder_start_token_id": 0},
    ),
    _seq2seq(
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        {"num_encoder_layers": 4, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
        seq=384,  # its buckets of relative positions reach 511 at most, two less than the positions it holds
    ),
)
