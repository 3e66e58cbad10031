"""Small models of several kinds."""

import pytest
import torch

from metro.modeling.configuration_metro_t5 import MetroT5Config
from metro.modeling.modeling_metro_t5 import MetroT5ForConditionalGeneration
from tests.recorded_models import load_tiny_t5


@pytest.fixture
def tiny_t5(golden):
    """The random T5 v1.1 that the FLIPPED numbers were computed with."""
    return load_tiny_t5(golden)


def small_model(kind: str) -> torch.nn.Module:
    """A randomly initialised model of one of the families, d_model 16, 40 words."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(d_model=16, vocab_size=40, pad_token_id=1, decoder_start_token_id=2)
    bart = dict(
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    t5 = dict(d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    if kind == "metro":
        return MetroT5ForConditionalGeneration(MetroT5Config(**sizes, **t5)).eval()
    if kind == "t5":  # tied: the decoder's output is scaled
        config = transformers.T5Config(**sizes, **t5)
        return transformers.T5ForConditionalGeneration(config).eval()
    if kind == "t5 untied":
        config = transformers.T5Config(**sizes, **t5, tie_word_embeddings=False)
        model = transformers.T5ForConditionalGeneration(config).eval()
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        return model
    if kind == "bart":
        config = transformers.BartConfig(**sizes, **bart, max_position_embeddings=64)
        model = transformers.BartForConditionalGeneration(config).eval()
        model.final_logits_bias.copy_(torch.randn(1, 40))
        return model
    if kind == "m2m":
        config = transformers.M2M100Config(**sizes, **bart, max_position_embeddings=64)
        return transformers.M2M100ForConditionalGeneration(config).eval()
    raise AssertionError(kind)


KINDS = ["metro", "t5", "t5 untied", "bart", "m2m"]


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    """A random T5 of d_model 32 with a tokenizer of its own, as a Hugging Face folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    from tests.finetuning import prepared

    folder = tmp_path_factory.mktemp("t5")
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{k}>" for k in range(8))]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [
        f"{e['input']} {e['target']} input: output: {' '.join(e['answer_choices'])}"
        for _, make, _ in prepared.TASKS.values()
        for e in map(make, range(60))
    ]
    trainer = trainers.WordLevelTrainer(special_tokens=special)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=special[3:],
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.1,
        decoder_start_token_id=0,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder
