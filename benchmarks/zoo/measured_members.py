"""The text models among the fifteen whose steps and memory were measured on GPUs, at the measured sizes.

The others lie where they belong: whisper_medium (audio), unet_sd15 and dit_xl2 (diffusion), resnet50, convnext_large
and vit_large (vision libraries), nn_transformer, lstm_lm and dlrm (written in torch).
"""

from __future__ import annotations

from member import Member

MEASURED: tuple[Member, ...] = (
    Member(
        "bert_large",
        "encoder",
        "transformers",
        "bert",
        "BertForMaskedLM",
        config={
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "vocab_size": 30522,
            "max_position_embeddings": 512,
        },
        seq=512,
    ),
    Member(
        "gemma_2b",
        "decoder",
        "transformers",
        "gemma",
        "GemmaForCausalLM",
        config={
            "hidden_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "intermediate_size": 16384,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
        },
        small={"num_key_value_heads": 1},
        seq=2048,
    ),
    Member(
        "gpt2_xl",
        "decoder",
        "transformers",
        "gpt2",
        "GPT2LMHeadModel",
        config={"n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024, "vocab_size": 50257},
        seq=1024,
    ),
    Member(
        "mixtral_small",
        "mixture of experts",
        "transformers",
        "mixtral",
        "MixtralForCausalLM",
        config={
            "hidden_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "intermediate_size": 3584,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
        },
        small={"num_local_experts": 4},
        seq=2048,
    ),
    Member(
        "pythia_1_4b",
        "decoder",
        "transformers",
        "gpt_neox",
        "GPTNeoXForCausalLM",
        config={
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 8192,
            "vocab_size": 50304,
            "max_position_embeddings": 2048,
            "rotary_pct": 0.25,
            "use_parallel_residual": True,
        },
        seq=2048,
    ),
    Member(
        "t5_large",
        "encoder-decoder",
        "transformers",
        "t5",
        "T5ForConditionalGeneration",
        config={
            "d_model": 1024,
            "d_ff": 2816,
            "d_kv": 64,
            "num_layers": 24,
            "num_heads": 16,
            "feed_forward_proj": "gated-gelu",
            "vocab_size": 32128,
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
        },
        seq=512,
        inputs=("input_ids=int64[B,S]<128", "labels=int64[B,S/4]<128"),
    ),
)
