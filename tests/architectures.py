"""Architectures of transformers on the device "meta", and how their tensors are routed, as lines of a table.

``python tests/architectures.py`` writes the tables of ``tests/routes`` anew; look at what changes. Sizes are those of
the default configurations, with few layers: shapes take no memory.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from hf_lopt.param_groups import branch_of
from hf_lopt.parameters import Parameter, describe


TABLES = Path(__file__).parent / "routes"
SOME, ALL = TABLES / "some.txt", TABLES / "all.txt"
# Type of the configuration -> class of the model. One of each kind, and all that hold tensors of an unusual kind.
ARCHITECTURES = {
    "afmoe": "AfmoeForCausalLM",
    "albert": "AlbertForMaskedLM",
    "audio-spectrogram-transformer": "ASTForAudioClassification",
    "bamba": "BambaForCausalLM",
    "bart": "BartForConditionalGeneration",
    "beit": "BeitForImageClassification",
    "bert": "BertForMaskedLM",
    "blip": "BlipForConditionalGeneration",
    "blip-2": "Blip2ForConditionalGeneration",
    "bloom": "BloomForCausalLM",
    "clip": "CLIPModel",
    "convnext": "ConvNextForImageClassification",
    "cpmant": "CpmAntForCausalLM",
    "csm": "CsmForConditionalGeneration",
    "dbrx": "DbrxForCausalLM",
    "deberta-v2": "DebertaV2ForMaskedLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deit": "DeiTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "distilbert": "DistilBertForMaskedLM",
    "efficientnet": "EfficientNetForImageClassification",
    "electra": "ElectraForPreTraining",
    "falcon": "FalconForCausalLM",
    "falcon_mamba": "FalconMambaForCausalLM",
    "fnet": "FNetForMaskedLM",
    "funnel": "FunnelForMaskedLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "grounding-dino": "GroundingDinoForObjectDetection",
    "hubert": "HubertForCTC",
    "ibert": "IBertForMaskedLM",
    "idefics": "IdeficsForVisionText2Text",
    "idefics2": "Idefics2ForConditionalGeneration",
    "jamba": "JambaForCausalLM",
    "jetmoe": "JetMoeForCausalLM",
    "kosmos-2": "Kosmos2ForConditionalGeneration",
    "layoutlmv3": "LayoutLMv3ForTokenClassification",
    "levit": "LevitForImageClassification",
    "llama": "LlamaForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
    "longt5": "LongT5ForConditionalGeneration",
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "mllama": "MllamaForConditionalGeneration",
    "mobilenet_v2": "MobileNetV2ForImageClassification",
    "mpt": "MptForCausalLM",
    "opt": "OPTForCausalLM",
    "perceiver": "PerceiverForMaskedLM",
    "phimoe": "PhimoeForCausalLM",
    "poolformer": "PoolFormerForImageClassification",
    "prophetnet": "ProphetNetForConditionalGeneration",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "recurrent_gemma": "RecurrentGemmaForCausalLM",
    "reformer": "ReformerModel",
    "resnet": "ResNetForImageClassification",
    "roformer": "RoFormerForMaskedLM",
    "rwkv": "RwkvForCausalLM",
    "sam": "SamModel",
    "segformer": "SegformerForSemanticSegmentation",
    "speecht5": "SpeechT5ForSpeechToText",
    "swin": "SwinForImageClassification",
    "swinv2": "Swinv2ForImageClassification",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "vit_mae": "ViTMAEForPreTraining",
    "vits": "VitsModel",
    "wav2vec2": "Wav2Vec2ForPreTraining",
    "wav2vec2-conformer": "Wav2Vec2ConformerForPreTraining",
    "whisper": "WhisperForConditionalGeneration",
    "xlnet": "XLNetLMHeadModel",
    "yolos": "YolosForObjectDetection",
    "zamba": "ZambaForCausalLM",
}
# Where the defaults do not build a model, or a needlessly long one.
SETTINGS = {
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 10000.0}, "n_layers": 1},
    "poolformer": {"depths": [1, 1, 1, 1]},
}
_LENGTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers")
_LENGTHS += ("num_encoder_layers", "num_decoder_layers", "depth")
# What their class alone tells.
_USUAL = {"Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "Embedding", "LayerNorm"}
_TASKS = ("PRETRAINING", "CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION", "CTC")


def build(kind: str, cls: type[nn.Module]) -> nn.Module:
    """The model on meta, of at most two layers where its configuration has a number of layers of a known name."""
    config_class = cls.config_class
    settings = SETTINGS.get(kind)
    if settings is None:
        default = config_class()
        lengths = {key: getattr(default, key, None) for key in _LENGTHS}
        settings = {key: 2 for key, n in lengths.items() if isinstance(n, int) and n > 2}
    try:
        config = config_class(**settings)
    except Exception:  # other settings have to fit the number of layers
        if kind in SETTINGS:
            raise
        config = config_class()
    with torch.device("meta"):
        return cls(config)


def has_matrix_axes(p: Parameter) -> bool:
    return sum(n > 1 for n in p.tensor.shape) > 1


def lines(kind: str, model: nn.Module) -> list[str]:
    """Of each tensor of two axes or more ``kind name branch role axis_order``, those of all layers as one. Ordinary
    linear layers and convolutions in the network, as torch stores them, are only counted, in the last line."""
    found: dict[str, None] = {}
    usual: set[str] = set()
    for p in filter(has_matrix_axes, describe(model)):
        name = re.sub(r"[.][0-9]+(?=[.]|$)", ".*", p.name)
        route = f"{branch_of(p)} {p.role} {p.axis_order}"
        if type(p.owner).__name__ in _USUAL and route == "network matrix torch":
            usual.add(name)
        else:
            found[f"{kind} {name} {route}"] = None
    return [*found, f"{kind} {len(usual)} network matrix torch"]


def unusual(model: nn.Module) -> Iterator[str]:
    """``class.attribute branch role axis_order`` of the tensors of two axes or more that do not belong to one of
    torch's usual layers."""
    for p in describe(model):
        if has_matrix_axes(p) and type(p.owner).__name__ not in _USUAL:
            yield f"{type(p.owner).__name__}.{p.leaf} {branch_of(p)} {p.role} {p.axis_order}"


def every_model() -> Iterator[nn.Module]:
    """Two models of each type of configuration that can be built from its defaults with what is installed."""
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    tasks = [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in _TASKS]
    mappings = [getattr(modeling_auto, name, {}) for name in (*tasks, "MODEL_MAPPING_NAMES")]
    for kind in configuration_auto.CONFIG_MAPPING_NAMES:
        names = [name for m in mappings for name in [m.get(kind, ())] if isinstance(name, str)]
        for name in list(dict.fromkeys(names))[:2]:
            with contextlib.suppress(Exception):  # libraries and settings that a default lacks
                model = build(kind, getattr(transformers, name))
                yield model.requires_grad_()


def some_lines() -> list[str]:
    import transformers

    return [
        line
        for kind, name in ARCHITECTURES.items()
        if hasattr(transformers, name)
        for line in lines(kind, build(kind, getattr(transformers, name)))
    ]


def all_lines() -> list[str]:
    return sorted({line for model in every_model() for line in unusual(model)})


def main() -> None:
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for path, found in ((SOME, some_lines()), (ALL, all_lines())):
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join([f"# transformers {transformers.__version__}", *found, ""]), encoding="utf-8")
        sys.stdout.write(f"{path}: {len(found)} lines\n")


if __name__ == "__main__":
    main()
