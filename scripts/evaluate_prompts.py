"""Accuracy of a model on the held-out rows of a folder of prepared prompts, by rank classification.

    python scripts/evaluate_prompts.py MODEL FOLDER [--method direct|channel|flipped]

FOLDER is made by `metro prepare-prompts --format jsonl`; its split `valid` is read. One line per
dataset: the mean over its templates of accuracy, macro-F1 and the level of guessing.
"""

import argparse
import json
from pathlib import Path
from statistics import mean


def evaluate(
    model,
    tokenizer,
    folder: Path,
    method: str,
    limit: int | None = None,
    lengths: tuple[int, int] = (512, 256),
) -> list[dict]:
    """One row per dataset. `limit`: examples per template, spread evenly over the split."""
    import numpy as np

    from metro.data.prompts.encoding import PromptEncoder
    from metro.data.prompts.stored import PromptedExamples, read_manifest
    from metro.evaluation.scoring.metrics import measure
    from metro.evaluation.scoring.rank_classification import PairScorer, RankClassifier
    from metro.evaluation.tasks.examples import EvaluationExample
    from metro.evaluation.tasks.protocol import longest_sequence

    longest = longest_sequence(model.config) or max(lengths)
    encoder = PromptEncoder(
        tokenizer,
        max_source_length=min(lengths[0], longest),
        max_target_length=min(lengths[1], longest),
    )
    found: dict[str, list] = {}
    for task, facts in read_manifest(folder)["splits"]["valid"].items():
        examples = PromptedExamples(folder / "valid" / task / "valid.jsonl")
        count = min(limit or len(examples), len(examples))
        chosen = [examples[int(i)] for i in np.linspace(0, len(examples) - 1, count).round()]
        questions = [
            EvaluationExample(
                e["row"], e["input"], e["answer_choices"], e["label"], e["flipped_input"],
                e["instruction"],
            )
            for e in chosen
            if e["answer_choices"]
            and e["label"] is not None
            and len(set(e["answer_choices"])) > 1
            and (method != "flipped" or e["instruction"])
        ]  # fmt: skip
        if not questions:
            continue
        classifier = RankClassifier(PairScorer(model), encoder, method)
        predictions = [ranking.prediction for ranking in classifier.rank(questions)]
        name = "/".join(filter(None, (facts["dataset"], facts["subset"])))
        found.setdefault(name, []).append((measure(questions, predictions), len(questions)))
    return [
        {
            "dataset": name,
            "prompts": len(measured),
            "examples": sum(count for _, count in measured),
            "accuracy": mean(m.accuracy for m, _ in measured),
            "macro-F1": mean(m.macro_f1 for m, _ in measured),
            "chance": mean(m.chance for m, _ in measured),
        }
        for name, measured in found.items()
    ]


def print_rows(rows: list[dict], title: str) -> None:
    print(f"{title}\n{'dataset':24} prompts examples accuracy macro-F1   chance")
    for row in rows:
        shares = "".join(f"{row[name]:9.1%}" for name in ("accuracy", "macro-F1", "chance"))
        print(f"{row['dataset']:24} {row['prompts']:7} {row['examples']:8}{shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, registered name or fairseq .pt")
    parser.add_argument("folder", type=Path, help="prepared prompts (jsonl)")
    parser.add_argument("--method", default="direct", choices=("direct", "channel", "flipped"))
    parser.add_argument("--limit", type=int, help="examples per template")
    parser.add_argument("--max-input-length", type=int, default=512)
    parser.add_argument("--max-target-length", type=int, default=256)
    parser.add_argument("--vocab", type=Path, help="of a fairseq .pt")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()

    import metro

    model, tokenizer = metro.load(options.model, vocab=options.vocab)
    rows = evaluate(
        model,
        tokenizer,
        options.folder,
        options.method,
        options.limit,
        (options.max_input_length, options.max_target_length),
    )
    print_rows(rows, f"{options.model}, {options.method}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
