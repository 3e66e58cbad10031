"""The model card of an export: its README.md, written from the facts in its files."""

from collections.abc import Mapping
from typing import Any

import torch

from metro.modeling.configuration_metro_t5 import MetroT5Config

PAPER = (
    "*Model-Generated Pretraining Signals Improves Zero-Shot Generalization of Text-to-Text "
    "Transformers* (Gong et al., ACL 2023)"
)

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text2text-generation
license:  # fill in before publishing, for example: mit
tags:
- metro-t5
---

# {name}

{summary}

## Use

Needed: `pip install 'transformers>=5.14,<6' torch sentencepiece`.

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder = "{name}"  # this folder, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Is this review positive or negative? Review: I loved it.", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
{show}
```

With METRO installed, `metro.load(folder)` gives model and tokenizer, runs none of the folder's
Python files, and `metro generate {name} "..."` answers on the command line.

## Architecture

Encoder-decoder Transformer, LayerNorm after every layer, learned absolute positions, a relative
position bias in each encoder layer, one matrix for all embeddings and the output.

{sizes}

## Training

{training}

## Licence, intended use, limitations

To be filled in by whoever publishes the model: its licence, what it is meant for, and what its
training text makes it unfit for. Texts that it writes can be wrong, and repeat what the training
text holds.
"""


def model_card(
    name: str,
    summary: str,
    config: MetroT5Config,
    weights: Mapping[str, torch.Tensor],
    training: Mapping[str, Any],
) -> str:
    """Format the model card in Markdown.

    Args:
        name: of the folder.
        summary: one paragraph on the model.
        config: its sizes.
        weights: its tensors, the embedding matrix once.
        training: rows of the table on training, by label; if empty, the card says so.
    """
    count = sum(tensor.numel() for tensor in weights.values())
    sizes = {
        "parameters": f"{count:,}",
        "width (d_model)": config.d_model,
        "feed-forward width (d_ff)": config.d_ff,
        "layers, encoder + decoder": f"{config.num_layers} + {config.num_decoder_layers}",
        "attention heads x width of one": f"{config.num_heads} x {config.d_kv}",
        "vocabulary, sentinels included": f"{config.vocab_size:,}",
        "longest sequence": config.max_positions,
        "relative position buckets, distance": f"{config.relative_attention_num_buckets}, "
        f"{config.relative_attention_max_distance}",
        "weights": str(weights["shared.weight"].dtype).removeprefix("torch."),
    }
    show = "print(tokenizer.decode(output[0], skip_special_tokens=True)"
    if config.decoder_start_token_id != config.eos_token_id:  # only pretrained
        show += '.replace("<sen000>", "")'
    return TEMPLATE.format(
        name=name,
        show=show + ")",
        summary=summary or f"A METRO-T5 model. Architecture: {PAPER}.",
        sizes=_table(sizes),
        training=_table(training)
        if training
        else "Unknown: the files it was made from do not say.",
    )


def _table(rows: Mapping[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [
        f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()
    ]
    return "\n".join(lines)
