"""What does not depend on the model: building it, finding it in wrappers, its blocks."""

from __future__ import annotations

from torch import nn

from vlmo.model.beit3 import BEiT3, BEiT3Config
from vlmo.model.config import VLMoConfig
from vlmo.model.vlmo import VLMo

Model = VLMo | BEiT3
Config = VLMoConfig | BEiT3Config


def build(config: Config) -> Model:
    """The model with a configuration, with its initial weights."""
    return BEiT3(config) if isinstance(config, BEiT3Config) else VLMo(config)


def name_of(config: Config) -> str:
    """The name of the model with a configuration, for messages."""
    return "BEiT-3" if isinstance(config, BEiT3Config) else "VLMo"


def inner(wrapped: nn.Module) -> Model:
    """The model inside DistributedDataParallel, torch.compile, PEFT or any other wrapper.

    Raises:
        TypeError: there is none.
    """
    for module in wrapped.modules():
        if isinstance(module, VLMo | BEiT3):
            return module
    raise TypeError(f"model: no VLMo or BEiT-3 is in this {type(wrapped).__name__}")


def blocks_of(model: Model) -> list[nn.Module]:
    """The blocks or layers of a model, from the first to the last."""
    layers = model.beit3.encoder.layers if isinstance(model, BEiT3) else model.transformer.blocks
    return [*layers]


def answers_head(config: Config) -> str:
    """Prefix of the names of the classifier's parameters in a model of VQA."""
    return "head." if isinstance(config, BEiT3Config) else "vqa_classifier."


def fits_vocabulary(config: Config, tokens: int) -> bool:
    """Whether a model can have a vocabulary of so many tokens.

    The embedding of the published BEiT-3 has more rows than ``beit3.spm`` has tokens.
    """
    if isinstance(config, BEiT3Config):
        return tokens <= config.vocab_size
    return tokens == config.vocab_size
