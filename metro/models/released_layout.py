"""The Hugging Face folders that the authors of METRO-T0 released, read as METRO-T5.

They say ``model_type: fairseq_t5`` and ``tokenizer_class: FairseqT5Tokenizer``, hold float16
weights under ``torch_dtype: float32`` (so arithmetic is in float32), and name Python files of the
authors in ``auto_map``, which are never run. The two classes below exist because transformers looks
them up by name; what they load are METRO's own classes.
"""

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.tokenization_metro_t5 import MetroT5Tokenizer


class FairseqT5Config(MetroT5Config):
    """Reads the released ``config.json``; gives a :class:`MetroT5Config`."""

    model_type = "fairseq_t5"

    @classmethod
    def from_dict(cls, config_dict, **kwargs) -> MetroT5Config:
        dropped = ("model_type", "auto_map", "architectures", "transformers_version")
        fields = {name: value for name, value in config_dict.items() if name not in dropped}
        fields["architectures"] = ["MetroT5ForConditionalGeneration"]
        return MetroT5Config.from_dict(fields, **kwargs)


class FairseqT5Tokenizer(MetroT5Tokenizer):
    """Reads the released tokenizer files; gives a :class:`MetroT5Tokenizer`."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> MetroT5Tokenizer:
        tokenizer = super().from_pretrained(*args, **kwargs)
        tokenizer.__class__ = MetroT5Tokenizer  # it is saved under this name
        return tokenizer
