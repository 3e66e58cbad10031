"""FLIPPED, DIRECT, CHANNEL and FLIPPED without unlikelihood from one model, same budget: a table.

    python scripts/compare_objectives.py --model MODEL.pt --vocab DIR --fresh --data-dir ROWS \\
        --templates TREE --out runs/compare

Prepares FLIPPED's mixture (only the datasets named by --dataset) and, unprepared for training, the
datasets of --unseen; trains each objective for the same number of updates on the same examples an
update; evaluates on held-out rows. Run again, it resumes where it was stopped. The table is printed
and written to OUT/table.json. `--fresh` takes only sizes and vocabulary of the model.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

VARIANTS = {  # name -> (objective, lambda, scored as)
    "FLIPPED": ("flipped", 3.0, "flipped"),
    "FLIPPED without unlikelihood": ("flipped", 0.0, "flipped"),
    "DIRECT": ("direct", 3.0, "direct"),
    "CHANNEL": ("channel", 3.0, "channel"),
}
TRAINED = ("ag_news", "rotten_tomatoes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="where all start")
    parser.add_argument("--fresh", action="store_true", help="start from random weights instead")
    parser.add_argument("--vocab", help="folder with sp.model and dict.txt, for a fairseq .pt")
    parser.add_argument("--data-dir", help="local rows; default: the hub")
    parser.add_argument("--templates", help="template tree; default: the fetched one")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset", action="append", help="of the mixture; default: two")
    parser.add_argument("--unseen", action="append", help="of T0's mixture; default: trec")
    parser.add_argument("--only", action="append", choices=VARIANTS, help="not all variants")
    parser.add_argument("--max-steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, help="default: 1e-3 --fresh, else 5e-4")
    parser.add_argument("--max-input-length", type=int, default=64)
    parser.add_argument("--eval-limit", type=int, default=40, help="held-out rows per template")
    parser.add_argument("--use-cpu", action="store_true")
    options = parser.parse_args()

    if options.learning_rate is None:  # a pretrained one of the demo's size learns nothing at 1e-3
        options.learning_rate = 1e-3 if options.fresh else 5e-4
    if options.fresh:
        options.model, options.vocab = fresh_model(options), None
    trained = prepare(options, "flipped", options.dataset or TRAINED, "trained")
    unseen = prepare(options, "t0", options.unseen or ["trec"], "unseen")
    table: dict[str, dict] = {}
    for name in options.only or VARIANTS:
        objective, weight, method = VARIANTS[name]
        folder = options.out / name.lower().replace(" ", "_")
        found = train_and_evaluate(
            options, folder, objective, weight, method, {"trained": trained, "unseen": unseen}
        )
        table[name] = {part: asdict(done.summary)["tasks"] for part, done in found.items()}
        for part, done in found.items():
            print(f"{name}: {part} tasks, held-out rows\n{done.table}")
    (options.out / "table.json").write_text(json.dumps(table, indent=2) + "\n")


def fresh_model(options) -> str:
    """A folder with a model of the same configuration, its weights drawn anew."""
    import torch

    import metro
    from metro.conversion.export import write_model

    folder = options.out / "start"
    if not folder.exists():
        model, tokenizer = metro.load(options.model, vocab=options.vocab)
        torch.manual_seed(1)
        summary = f"Random weights in the sizes of {options.model}."
        write_model(type(model)(model.config), tokenizer, folder, summary=summary)
    return str(folder)


def prepare(options, mixture: str, datasets, name: str) -> Path:
    from metro.data.prompts.prepare import prepare_prompts

    folder = options.out / f"data_{name}"
    prepare_prompts(
        mixture=mixture,
        out=folder,
        format="jsonl",
        datasets=list(datasets),
        data_dir=options.data_dir,
        templates=options.templates,
        validation="all",
        valid_limit=200,
    )
    return folder


def train_and_evaluate(options, folder: Path, objective, weight, method, data: dict) -> dict:
    """Evaluation of each part of `data`; what is there already is not done again."""
    import metro
    from metro.finetuning.settings import FinetuningSettings

    # CHANNEL writes what the others read
    longest_target = options.max_input_length if objective == "channel" else 64
    given = dict(
        model=options.model,
        vocab=options.vocab,
        data=str(data["trained"]),
        output_dir=str(folder),
        objective=objective,
        unlikelihood_weight=weight,
        max_steps=options.max_steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        max_input_length=options.max_input_length,
        max_target_length=longest_target,
        warmup_steps=options.max_steps // 10,
        eval_steps=options.max_steps,
        eval_limit=10,
        logging_steps=20,
        use_cpu=options.use_cpu,
        report_to="none",
    )
    metro.finetune(FinetuningSettings.combine("tiny", given))
    return {
        part: metro.evaluate(
            str(folder),
            suite=str(prompts),
            out=folder / "evaluation",
            run_name=f"{part}_{options.max_steps}_{options.eval_limit}",
            method=method,
            limit=options.eval_limit,
            max_source_length=options.max_input_length,
            max_target_length=longest_target,
            device="cpu" if options.use_cpu else None,
        )
        for part, prompts in data.items()
    }


if __name__ == "__main__":
    main()
