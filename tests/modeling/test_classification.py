"""METRO-T5 with a classification head, as ``AutoModelForSequenceClassification`` makes it."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import metro
from metro.modeling.classification_metro_t5 import MetroT5ForSequenceClassification
from tests.modeling.conftest import EOS, IDS, MASK, PAD, tiny


def classifier(num_labels: int = 3, **changes) -> MetroT5ForSequenceClassification:
    """With the weights of `tiny` below a head that matters."""
    torch.manual_seed(0)
    base = tiny()
    for name, value in {"num_labels": num_labels, **changes}.items():
        setattr(base.config, name, value)
    model = MetroT5ForSequenceClassification(base.config)
    keys = model.load_state_dict(base.state_dict(), strict=False)
    assert all(name.startswith("classification_head") for name in keys.missing_keys)
    return model.eval()


@torch.no_grad()
def test_logits_are_the_heads_of_the_decoder_at_the_end_symbol():
    """Oracle: each text by itself, the whole decoder, its state at the end symbol."""
    model = classifier()
    found = model(IDS, MASK).logits
    shifted = torch.cat([IDS.new_full((3, 1), model.config.decoder_start_token_id), IDS], 1)
    for row, expected in enumerate(found):
        length = int(MASK[row].sum())
        ids = IDS[row : row + 1, :length]
        states = model.encoder(ids).last_hidden_state
        decoded = model.decoder(shifted[row : row + 1, :length], encoder_hidden_states=states)
        alone = model.classification_head(decoded.last_hidden_state[:, -1])
        torch.testing.assert_close(expected, alone[0], atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3


@torch.no_grad()
def test_padding_and_a_second_end_symbol_change_nothing():
    model = classifier()
    expected = model(IDS, MASK).logits
    right = F.pad(IDS, (0, 3), value=PAD), F.pad(MASK, (0, 3))
    left = torch.tensor([[0, 40, EOS]]), torch.tensor([[1, 1, 1]])
    torch.testing.assert_close(model(*right).logits, expected, atol=1e-5, rtol=1e-5)
    padded = F.pad(left[0], (2, 0), value=PAD), F.pad(left[1], (2, 0))
    torch.testing.assert_close(model(*padded).logits, model(*left).logits, atol=1e-5, rtol=1e-5)
    pair = torch.tensor([[0, 40, EOS, 41, EOS]])  # two texts: the last end symbol counts
    longer = torch.cat([pair, torch.full((1, 2), PAD)], 1)
    both = model(longer, longer.ne(PAD).long()).logits
    torch.testing.assert_close(both, model(pair).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="every text needs an end symbol"):
        model(torch.tensor([[0, 40, 41]]))


@pytest.mark.client("PEFT", "LoRA of a classifier")
def test_lora_adapts_a_classifier(tmp_path):
    """Oracle: the adapted model before it was saved."""
    peft = pytest.importorskip("peft")
    model, rate = classifier(), 1.0
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config)
    before = model(IDS, MASK).logits
    adapted(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([2, 0, 1])).loss.backward()
    with torch.no_grad():
        for weight in (weight for weight in adapted.parameters() if weight.requires_grad):
            weight -= rate * weight.grad
        found = adapted.eval()(input_ids=IDS, attention_mask=MASK).logits
    assert (found - before).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=IDS, attention_mask=MASK).logits, found)
    with pytest.raises(ValueError, match="takes input_ids, not inputs_embeds"):
        model(inputs_embeds=model.shared(IDS))


def test_the_loss_is_that_of_the_labels_kind():
    """Oracle: torch's losses of the logits."""
    model = classifier()
    logits, classes = model(IDS, MASK).logits, torch.tensor([2, 0, 1])
    several = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]])
    assert model(IDS, MASK, labels=classes).loss == F.cross_entropy(logits, classes)
    loss = model(IDS, MASK, labels=several).loss
    assert loss == F.binary_cross_entropy_with_logits(logits, several)
    one, numbers = classifier(num_labels=1), torch.tensor([0.5, 2, -1])
    assert one(IDS, MASK, labels=numbers).loss == F.mse_loss(one(IDS, MASK).logits[:, 0], numbers)


@pytest.mark.client("Trainer", "`AutoModelForSequenceClassification`")
def test_a_folder_of_metro_becomes_a_classifier_that_finetunes(exported, tmp_path):
    """Rows with a word or without it, by the Trainer; the saved classifier answers the same."""
    metro.register()
    folder = exported("t5_prompt_tiny_f")
    torch.manual_seed(0)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, output_loading_info=True
    )
    assert type(model) is MetroT5ForSequenceClassification
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"classification_head"}
    base = metro.load(folder)
    assert torch.equal(model.decoder.block[0].layer[0].SelfAttention.q.weight,
                       base.model.decoder.block[0].layer[0].SelfAttention.q.weight)  # fmt: skip
    things = ["sea", "house", "tree", "river", "lobster", "mat", "road", "hill"]
    texts = [(f"the {a} and the {b} {w}", int(w == "yes")) for a in things for b in things
             for w in ("yes", "no")]  # fmt: skip
    rows = [{**base.tokenizer(text), "labels": label} for text, label in texts]
    train, held_out = rows[: len(rows) * 3 // 4], rows[len(rows) * 3 // 4 :]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=40, per_device_train_batch_size=16, seed=0,
        learning_rate=3e-3, lr_scheduler_type="constant", report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_steps=1000,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=train, processing_class=base.tokenizer)
    trainer.train()
    predicted = trainer.predict(held_out)
    right = (
        predicted.predictions[0]
        if isinstance(predicted.predictions, tuple)
        else (predicted.predictions)
    )
    accuracy = (right.argmax(-1) == predicted.label_ids).mean()
    assert accuracy > 0.9  # chance 0.5
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    ids = torch.tensor([rows[0]["input_ids"]])
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    with torch.no_grad():  # to rounding: products depend on where in memory the weights lie
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
