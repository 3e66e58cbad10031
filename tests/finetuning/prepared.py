"""Folders of prepared prompts, written by hand as ``metro prepare-prompts`` lays them out."""

import json
from pathlib import Path

import numpy as np

GOOD, BAD = "good great fine lovely".split(), "bad awful poor sad".split()
TOPICS = {"Sport": "match team goal".split(), "Money": "bank stock price".split()}
TOPICS["Music"] = "song band tune".split()


def sentiment(row: int, template: int) -> dict:
    is_good = row % 2
    words = [(GOOD if is_good else BAD)[(row // 2 + k) % 4] for k in range(1 + row % 3)]
    text = f"it was {' '.join(words)}"
    options = ["Bad", "Good"]
    literal = [" How was it?", " Did they like it?"][template]
    return example(f"{text}{literal}", text, literal, options, is_good)


def topic(row: int, template: int) -> dict:
    names = list(TOPICS)
    label = row % 3
    text = f"the {TOPICS[names[label]][row // 3 % 3]} of today {'and more ' * (row % 5)}"
    return example(f"{text} What is it about?", text, " What is it about?", names, label)


def example(prompt, text, literal, options, label) -> dict:
    return {
        "input": prompt,
        "target": options[label],
        "answer_choices": options,
        "label": label,
        "flipped_input": f"{text}<extra_id_0>",
        "instruction": f"<extra_id_0> {literal}",
    }


TASKS = {  # name -> (dataset, how a row looks, rows: all but every third for the second template)
    "sentiment_how": ("sentiment", lambda row: sentiment(row, 0), lambda n: range(n)),
    "sentiment_like": ("sentiment", lambda row: sentiment(row, 1), lambda n: range(0, n, 3)),
    "topic_about": ("topic", lambda row: topic(row, 0), lambda n: range(n)),
}


def write_prepared(
    folder: Path, num_rows: int = 60, mixture: str = "flipped", change=None, caps=None
) -> Path:
    """`change(example)` may edit an example, or return None to leave it out."""
    splits: dict = {"train": {}, "valid": {}}
    for split in splits:
        first = 0 if split == "train" else num_rows
        count = num_rows if split == "train" else max(6, num_rows // 5)
        for name, (dataset, make, rows) in TASKS.items():
            facts = {"dataset": dataset, "subset": None, "prompt_name": name.split("_")[1]}
            made = [{"task": name, **facts, "row": i, **make(first + i)} for i in rows(count)]
            examples = [kept for e in made if (kept := change(e) if change else e) is not None]
            write_task(folder / split / name, split, examples)
            size = {"num_examples": len(examples), "cap": (caps or {}).get(name)}
            splits[split][name] = {**facts, **size}
    manifest = {"format": "jsonl", "mixture": mixture, "seed": 1, "splits": splits}
    (folder / "prompts.json").write_text(json.dumps(manifest))
    return folder


def write_task(folder: Path, split: str, examples: list[dict]) -> None:
    folder.mkdir(parents=True)
    lines = [json.dumps(example) + "\n" for example in examples]
    (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    ends = np.cumsum([0, *(len(line.encode()) for line in lines)]).astype(np.int64)
    np.save(folder / f"{split}.offsets.npy", ends)
    np.save(folder / f"{split}.rows.npy", np.array([e["row"] for e in examples], np.int32))


def write_t5(folder: Path, max_shard_size: str = "50GB", **sizes) -> Path:
    """A random T5 (of d_model 32) with a tokenizer of its own, as a Hugging Face folder."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{k}>" for k in range(8))]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [
        f"{e['input']} {e['target']} input: output: {' '.join(e['answer_choices'])}"
        for _, make, _ in TASKS.values()
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
    tiny = dict(vocab_size=tokenizer.get_vocab_size(), d_model=32, d_kv=16, d_ff=64)
    tiny |= dict(num_layers=1, num_heads=2, dropout_rate=0.1, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**tiny | sizes))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
