"""METRO-T5 in the Auto classes of transformers, so that its folders load without remote code.

:func:`register` adds two model types: ``metro_t5``, which METRO exports, and ``fairseq_t5``, that
of the folders that the authors of METRO-T0 released. Those hold float16 weights under
``torch_dtype: float32`` (so arithmetic is in float32), and name Python files of their authors in
``auto_map``, which are never run: METRO's own classes read them.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoTokenizer,
)

from metro.modeling.classification_metro_t5 import MetroT5ForSequenceClassification
from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5EncoderModel, MetroT5ForConditionalGeneration
from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer
from metro.models.adapters import register_default_targets


class FairseqT5Config(MetroT5Config):
    """Reader of the released ``config.json``, as a :class:`MetroT5Config`."""

    model_type = "fairseq_t5"

    @classmethod
    def from_dict(cls, config_dict, **kwargs) -> MetroT5Config:
        dropped = ("model_type", "auto_map", "architectures", "transformers_version")
        fields = {name: value for name, value in config_dict.items() if name not in dropped}
        fields["architectures"] = ["MetroT5ForConditionalGeneration"]
        return MetroT5Config.from_dict(fields, **kwargs)


class FairseqT5Tokenizer(MetroT5Tokenizer):
    """Reader of the released tokenizer files, which name this class, as a METRO tokenizer."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> MetroT5Tokenizer:
        return MetroT5Tokenizer.from_pretrained(*args, **kwargs)


def register() -> None:
    """Make METRO-T5 known to the Auto classes of transformers, in this process.

    So that ``AutoModel...`` and ``AutoTokenizer`` open METRO's folders without
    ``trust_remote_code=True``, and PEFT, where it is installed, knows which modules an adapter of
    METRO-T5 changes by default. ``metro.load`` calls it; after ``import metro`` so does the import
    of transformers' Auto classes (:mod:`metro.registration`). Calling it again does nothing.
    """
    for config in (MetroT5Config, FairseqT5Config):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoTokenizer.register(MetroT5Config, slow_tokenizer_class=MetroT5Tokenizer, exist_ok=True)
    AutoTokenizer.register(FairseqT5Config, slow_tokenizer_class=FairseqT5Tokenizer, exist_ok=True)
    AutoModelForSeq2SeqLM.register(MetroT5Config, MetroT5ForConditionalGeneration, exist_ok=True)
    AutoModelForSequenceClassification.register(
        MetroT5Config, MetroT5ForSequenceClassification, exist_ok=True
    )
    AutoModel.register(MetroT5Config, MetroT5EncoderModel, exist_ok=True)
    AutoModelForTextEncoding.register(MetroT5Config, MetroT5EncoderModel, exist_ok=True)
    register_default_targets(MetroT5Config.model_type)
