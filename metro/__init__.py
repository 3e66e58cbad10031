"""METRO: pretraining of T5-style models with signals from an auxiliary model.

The whole work as functions, each of which takes the options of its command as keywords:

    import metro

    metro.prepare_text(inputs=["book.txt"], out="data", train_vocab=8000)
    metro.pretrain(config="metro_t5_tiny", data="data", output_dir="model")
    metro.prepare_prompts(mixture="t0", out="prompts")
    metro.finetune(model="metro_t0_base", data="prompts", output_dir="finetuned")
    metro.generate("finetuned", ["Is the sky blue?"])
    metro.rank(model="finetuned", input="mails.csv", text="body", options=["bill", "other"])
    evaluation = metro.evaluate("finetuned", suite="t0", limit=100)
    metro.report(evaluation.folder, out="report")

`import metro` is instant: the public names below are imported on first use. It also makes METRO-T5
known to the Auto classes of transformers, as soon as those are imported.
"""

import importlib

from metro.registration import register_on_import as _register_on_import

__version__ = "0.1.0"

# Public name -> module that defines it.
_PUBLIC: dict[str, str] = {
    "load": "metro.models.loading",
    "generate": "metro.generation.answers",
    "prepare_text": "metro.data.text.corpus",
    "prepare_prompts": "metro.data.prompts.prepare",
    "pretrain": "metro.training.pretrain",
    "finetune": "metro.finetuning.run",
    "evaluate": "metro.evaluation.evaluate",
    "report": "metro.evaluation.report.build",
    "plan": "metro.planning.plan",
    "rank": "metro.ranking.run",
    "Ranker": "metro.ranking.ranker",
    "fuse": "metro.fusion",
    "LoadedModel": "metro.models.loading",
    "MetroT5Config": "metro.modeling.configuration_metro_t5",
    "MetroT5EncoderModel": "metro.modeling.modeling_metro_t5",
    "MetroT5ForSequenceClassification": "metro.modeling.classification_metro_t5",
    "MetroT5ForConditionalGeneration": "metro.modeling.modeling_metro_t5",
    "MetroT5Tokenizer": "metro.modeling.tokenization_metro_t5",
    "MetroPretrainingModel": "metro.pretraining.model",
    "register": "metro.models.auto_classes",
    "UserError": "metro.utils.messages",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'metro' has no attribute {name!r}; it offers {__all__}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


_register_on_import()
