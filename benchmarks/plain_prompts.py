"""The plain way from rows and templates to fairseq's files, as T0's data was first made.

Every template is compiled again for every example, as promptsource does it; every line is
normalised and encoded on its own; `fairseq-preprocess` binarises the text files of each task. One
process per core works on whole tasks; Python and fairseq are started once, not once per task, which
is kinder to this side than a shell loop. Serves as the slow side of `prompt_data.py`.
"""

import argparse
import contextlib
import io
import json
import re
import runpy
import sys
from multiprocessing import Pool
from pathlib import Path

import yaml
from jinja2 import BaseLoader
from jinja2.sandbox import SandboxedEnvironment

from benchmarks.plain_chain import normalize_plainly

BARS = "3ed2d"


class Loader(yaml.SafeLoader):
    pass


for tag in ("!Template", "!TemplateMetadata"):
    Loader.add_constructor(tag, lambda loader, node: loader.construct_mapping(node, deep=True))


def render(template, row):
    """Prompt and answer of one example, everything compiled anew."""
    environment = SandboxedEnvironment(loader=BaseLoader())
    environment.globals.update(zip=zip)
    row = {
        key: value.replace("|||", BARS) if isinstance(value, str) else value
        for key, value in row.items()
    }
    row["answer_choices"] = None
    if template["answer_choices"]:
        text = environment.from_string(template["answer_choices"]).render(**row)
        row["answer_choices"] = [part.replace(BARS, "|||").strip() for part in text.split("|||")]
    source = template["jinja"].replace("}}", " | string | truncate(2048) }}")
    text = environment.from_string(source).render(**row)
    return [part.replace(BARS, "|||").strip() for part in text.split("|||")]


def make_task(job):
    """Render, encode line by line, binarise: one task."""
    dataset, subset, template, rows_file, vocab, out = job
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(Path(vocab) / "sp.model"))
    name = "_".join(filter(None, (dataset, subset, template["name"])))
    task = re.sub(r"[^a-zA-Z0-9_.]+", "_", name)
    folder = Path(out) / "train" / task
    folder.mkdir(parents=True)
    count = 0
    with open(f"{folder}.src", "w") as source, open(f"{folder}.tgt", "w") as target:
        with open(rows_file) as rows:
            for line in rows:
                parts = render(template, json.loads(line))
                if len(parts) != 2 or not parts[1]:
                    continue
                for file, text in zip((source, target), parts, strict=True):
                    text = normalize_plainly(" ".join(text.split()), True)
                    file.write(" ".join(processor.encode(text, out_type=str)) + "\n")
                count += 1
    arguments = ["--source-lang", "src", "--target-lang", "tgt", "--trainpref", str(folder)]
    arguments += ["--srcdict", f"{vocab}/dict.txt", "--tgtdict", f"{vocab}/dict.txt"]
    sys.argv = ["fairseq-preprocess", *arguments, "--destdir", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_module("fairseq_cli.preprocess", run_name="__main__")
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--templates", type=Path, required=True)
    parser.add_argument("--vocab", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("sets", nargs="+", help="DATASET[/SUBSET]=ROWS.jsonl")
    args = parser.parse_args()
    jobs = []
    for entry in args.sets:
        name, _, rows_file = entry.partition("=")
        dataset, _, subset = name.partition("/")
        with open(args.templates / name / "templates.yaml") as file:
            templates = yaml.load(file, Loader)["templates"].values()
        jobs += [
            (dataset, subset, template, rows_file, args.vocab, args.out) for template in templates
        ]
    with Pool(args.workers) as pool:
        print(sum(pool.imap_unordered(make_task, jobs)))


if __name__ == "__main__":
    sys.exit(main())
