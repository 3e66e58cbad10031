"""METRO: pretraining of T5-style models with signals from an auxiliary model.

`import metro` is instant: the public names below are imported on first use.
"""

import importlib

__version__ = "0.1.0"

# Public name -> module that defines it.
_PUBLIC: dict[str, str] = {
    "MetroT5Config": "metro.modeling.configuration_metro_t5",
    "MetroT5EncoderModel": "metro.modeling.modeling_metro_t5",
    "MetroT5ForConditionalGeneration": "metro.modeling.modeling_metro_t5",
    "MetroT5Tokenizer": "metro.modeling.tokenization_metro_t5",
    "MetroPretrainingModel": "metro.pretraining.model",
    "load": "metro.models.loading",
    "LoadedModel": "metro.models.loading",
    "register": "metro.models.auto_classes",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'metro' has no attribute {name!r}; it offers {__all__}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
