"""The zoo's members that are files of code: timm, torchvision, torch's own layers, recommenders, hand-written nets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from member import Member

Sizes = Mapping[str, Any]


def _timm(name: str, model: str, small: Sizes, small_seq: int = 32, **more: Any) -> Member:
    seq = more.pop("seq", 224)
    config = {"name": model, **more.pop("config", {})}
    file = "timm_models.py:classifier"
    return Member(name, "vision", "timm", file=file, config=config, small=small, seq=seq, small_seq=small_seq, **more)


def _torchvision(name: str, factory: str, config: Sizes, small: Sizes, small_seq: int = 64, **more: Any) -> Member:
    file = f"torchvision_{factory}"
    seq = more.pop("seq", 224)
    return Member(
        name, "vision", "torchvision", file=file, config=config, small=small, seq=seq, small_seq=small_seq, **more
    )


def _torch(name: str, family: str, file: str, small: Sizes, seq: int, **more: Any) -> Member:
    return Member(name, family, more.pop("library", "torch"), file=file, small=small, seq=seq, **more)


def _hand(name: str, file: str, small: Sizes, seq: int = 1024, **more: Any) -> Member:
    return Member(name, "hand-written", "hand-written", file=file, small=small, seq=seq, **more)


_TINY_VIT: Sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
_TINY_STAGES: Sizes = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 64)}

_NO_CHANCE: Sizes = {"dropout": 0.0, "stochastic_depth_prob": 0.0}

_TIMM = (
    _timm("vit_large", "vit_large_patch16_224", _TINY_VIT),
    _timm("convnext_large", "convnext_large", _TINY_STAGES, 64),
    _timm("timm_eva02_large", "eva02_large_patch14_224", _TINY_VIT),
    _timm("timm_mixer_b16", "mixer_b16_224", {"name": "mixer_s32_224", "img_size": 64}, 64),
    _timm("timm_cait_s24", "cait_s24_224", _TINY_VIT),
    _timm("timm_xcit_small_12", "xcit_small_12_p16_224", _TINY_VIT),
    _timm("timm_mobilevit_s", "mobilevit_s", {}, 64, seq=256),
    _timm("timm_beitv2_base", "beitv2_base_patch16_224", _TINY_VIT),
    _timm("timm_nfnet_f0", "nfnet_f0", {"name": "nfnet_l0"}, 64, seq=192),
    _timm("timm_coatnet_0", "coatnet_0_rw_224", {"img_size": 64}, 64),
    _timm(
        "timm_efficientformer_l1", "efficientformer_l1", {"depths": (1, 1, 2, 4), "embed_dims": (16, 32, 32, 64)}, 224
    ),
    _timm(
        "timm_swinv2_tiny",
        "swinv2_tiny_window8_256",
        {
            "img_size": 64,
            "embed_dim": 16,
            "depths": (2, 2, 2, 2),
            "num_heads": (2, 4, 4, 4),
            "window_size": 4,
            "drop_path_rate": 0.0,
        },
        64,
        seq=256,
    ),
    _timm("timm_deit3_large", "deit3_large_patch16_224", _TINY_VIT),
    _timm(
        "timm_pvt_v2_b2",
        "pvt_v2_b2",
        {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 32, 64), "num_heads": (1, 2, 4, 4)},
        64,
    ),
    _timm("timm_res2net50", "res2net50_26w_4s", {"layers": (1, 1, 1, 1)}, 64),
    _timm("timm_hrnet_w18", "hrnet_w18", {}, 64, executed=False, why_not="266 units: minutes on two cores"),
)
_TORCHVISION = (
    _torchvision("resnet50", "models.py:resnet", {}, {"layers": (2, 2, 2, 2), "width_per_group": 16}),
    _torchvision("tv_regnet_y_8gf", "models.py:classifier", {"name": "regnet_y_8gf"}, {"name": "regnet_y_400mf"}),
    _torchvision(
        "tv_efficientnet_b4",
        "models.py:classifier",
        {"name": "efficientnet_b4"},
        {"name": "efficientnet_b0", **_NO_CHANCE},
        seq=380,
    ),
    _torchvision(
        "tv_convnext_base",
        "models.py:classifier",
        {"name": "convnext_base"},
        {"name": "convnext_tiny", "stochastic_depth_prob": 0.0},
    ),
    _torchvision(
        "tv_vit", "models.py:vit", {}, {"image": 32, "patch": 8, "layers": 4, "heads": 4, "width": 32, "mlp": 64}, 32
    ),
    _torchvision(
        "tv_swin_t",
        "models.py:swin",
        {},
        {"embed_dim": 16, "heads": (2, 4, 4, 8), "depths": (2, 2), "window": 4, "drop_path": 0.0},
        32,
    ),
    _torchvision("tv_densenet121", "models.py:densenet", {}, {"growth": 8, "blocks": (2, 2, 2, 2), "features": 16}),
    _torchvision("tv_inception_v3", "models.py:classifier", {"name": "inception_v3"}, {"dropout": 0.0}, 299, seq=299),
    _torchvision(
        "tv_mobilenet_v3_large",
        "models.py:classifier",
        {"name": "mobilenet_v3_large"},
        {"name": "mobilenet_v3_small", "dropout": 0.0},
    ),
    _torchvision(
        "tv_maxvit_t",
        "models.py:classifier",
        {"name": "maxvit_t"},
        {},
        224,
        executed=False,
        why_not="accepts no smaller images",
    ),
    _torchvision("tv_vgg16", "models.py:classifier", {"name": "vgg16"}, {"name": "vgg11", "dropout": 0.0}),
    _torchvision(
        "tv_shufflenet_v2", "models.py:classifier", {"name": "shufflenet_v2_x1_0"}, {"name": "shufflenet_v2_x0_5"}
    ),
    _torchvision(
        "tv_deeplabv3",
        "segmentation.py:segmenter",
        {"name": "deeplabv3_resnet50"},
        {"name": "deeplabv3_mobilenet_v3_large", "dropout": 0.0},
        seq=512,
    ),
    _torchvision("tv_fcn_resnet50", "segmentation.py:segmenter", {"name": "fcn_resnet50"}, {"dropout": 0.0}, seq=512),
)

_SMALL_TEXT: Sizes = {"vocab": 128, "dim": 32, "heads": 4, "layers": 4}
_SMALL_ODD: Sizes = {"dim": 32, "heads": 4, "layers": 4}

_TORCH = (
    _torch(
        "nn_transformer",
        "torch",
        "torch_models.py:nn_transformer",
        {**_SMALL_TEXT, "ffn": 128, "dropout": 0.0, "longest": 64},
        512,
    ),
    _torch(
        "nn_encoder",
        "torch",
        "torch_models.py:nn_encoder",
        {**_SMALL_TEXT, "ffn": 128, "dropout": 0.0, "longest": 64},
        512,
    ),
    _torch(
        "lstm_lm",
        "torch",
        "torch_models.py:lstm_lm",
        {"vocab": 128, "emb": 32, "hid": 32, "layers": 4, "dropout": 0.0},
        256,
    ),
    _torch("gru_tagger", "torch", "torch_models.py:gru_tagger", {"vocab": 128, "dim": 32, "layers": 4, "tags": 8}, 256),
    _torch("lstm_cells", "torch", "torch_models.py:lstm_cells", {"vocab": 128, "dim": 32, "layers": 2}, 256),
    _torch("dlrm", "recommender", "recommenders.py:dlrm", {"tables": 4, "rows": 64, "dim": 16, "wide": 32}, 1),
    _torch(
        "bag_ranker",
        "recommender",
        "recommenders.py:bag_ranker",
        {"items": 256, "features": 4, "dim": 16, "wide": 32, "crosses": 4},
        64,
    ),
    _torch(
        "message_passing",
        "graph",
        "graph_networks.py:message_passing",
        {"dim": 32, "layers": 4, "kinds": 16},
        64,
        library="hand-written",
    ),
    _torch("u_net", "graph", "convolution_styles.py:u_net", {"width": 8}, 256, small_seq=32, library="hand-written"),
    _torch(
        "nested_u_net",
        "graph",
        "convolution_styles.py:nested_u_net",
        {"width": 8, "levels": 2},
        256,
        small_seq=32,
        library="hand-written",
    ),
    _torch(
        "dit_xl2",
        "diffusion",
        "dit.py:dit",
        {"depth": 4, "dim": 32, "heads": 4, "classes": 7, "side": 8},
        32,
        small_seq=8,
        library="hand-written",
    ),
    _torch(
        "unet_sd15",
        "diffusion",
        "unet.py:unet",
        {"ch": 32, "mult": (1, 2), "ctx": 32},
        64,
        small_seq=16,
        library="hand-written",
    ),
)
_HAND = (
    _hand("fused_qkv_gate_up", "attention_styles.py:fused", {**_SMALL_TEXT, "dim": 48, "longest": 64}),
    _hand("grouped_fused_qkv", "attention_styles.py:grouped_fused", {**_SMALL_TEXT, "groups": 2, "longest": 64}),
    _hand("einsum_attention", "attention_styles.py:einsum", {**_SMALL_TEXT, "longest": 64}),
    _hand("raw_parameters", "attention_styles.py:raw_parameters", {**_SMALL_TEXT, "longest": 64}),
    _hand("tied_weights", "attention_styles.py:tied_weights", {**_SMALL_TEXT, "longest": 64}),
    _hand("shared_depth", "odd_styles.py:shared_depth", _SMALL_ODD, 512),
    _hand("siamese", "odd_styles.py:siamese", _SMALL_ODD, 512),
    _hand("custom_functions", "odd_styles.py:custom_functions", {"dim": 32, "layers": 4}, 512),
    _hand("dict_input", "odd_styles.py:dict_input", _SMALL_ODD, 512),
    _hand("keyword_only", "odd_styles.py:keyword_only", _SMALL_ODD, 512),
    _hand("in_place", "odd_styles.py:in_place", {"dim": 32, "layers": 4}, 512),
    _hand("moving_buffers", "odd_styles.py:moving_buffers", _SMALL_ODD, 512),
    _hand("early_exit", "odd_styles.py:early_exit", _SMALL_ODD, 512),
    _hand("looped_experts", "odd_styles.py:looped_experts", {"dim": 32, "layers": 4}, 256),
)
CODE: tuple[Member, ...] = (*_TIMM, *_TORCHVISION, *_TORCH, *_HAND)
