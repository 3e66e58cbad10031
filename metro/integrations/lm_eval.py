"""METRO's scores in lm-evaluation-harness: its model type ``metro``.

    python -m metro.integrations.lm_eval run --model metro \\
        --model_args pretrained=metro_t0_base,method=direct --tasks copa

The harness finds no model types of other packages by itself: run its command line through this
module, or import the module before ``lm_eval.simple_evaluate``.

The log-likelihood of a continuation is METRO's score (``metro evaluate``, ``metro rank``), which
counts the end symbol and the special tokens of the model's protocol:

    direct   log P(continuation, end | context)
    channel  log P(context, end | continuation)
    flipped  log P(instruction, end | input, continuation); ``template`` splits the task's document
             into input and instruction

The harness's own backend for sequence-to-sequence models leaves the end symbol out, so that a
choice that is the beginning of another one ("no", "not sure") is never less probable than it.
"""

import itertools
import sys
from typing import Any

from metro.data.jsonl_rows import UnusableRow
from metro.data.prompts.instruction import model_texts
from metro.evaluation.scoring.pair_scoring import Pair
from metro.evaluation.scoring.rank_classification import encode_once
from metro.generation.answers import answer_texts
from metro.generation.settings import GenerationSettings
from metro.ranking.ranker import Ranker
from metro.utils.messages import MissingPackage, UserError

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    raise MissingPackage("lm-evaluation-harness", "lm_eval", "lm-eval") from None

CHOICES = "choices_of_lm_eval"
"""Field of a document that holds the continuations asked about it."""


class _Scorer(Ranker):
    with_misses = True


@register_model("metro")
class MetroLM(LM):
    """A model of METRO, or any sequence-to-sequence model, scored as METRO scores.

    Args:
        pretrained: registered name, hub id, Hugging Face folder, adapter or checkpoint (``.pt``).
        method: ``direct``, ``channel`` or ``flipped``; by default the one it was trained for.
        template: for flipped, Jinja text with the fields of the task's documents, or a file of it.
        device, dtype: of the weights.
        batch_size, max_batch_size: not used; ``batch_tokens`` limits the tokens of a batch.
        options: further fields of `RankSettings`: ``protocol``, ``max_source_length``, ``vocab``...

    Raises:
        UserError: an option is wrong, or there is no such model.
    """

    def __init__(
        self,
        pretrained: str,
        method: str | None = None,
        template: str | None = None,
        device: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **options: Any,
    ):
        super().__init__()
        if template is not None and template.endswith((".txt", ".jinja", ".j2")):
            with open(template, encoding="utf-8") as file:
                template = file.read()
        self.ranker = _Scorer(
            pretrained,
            method=method,
            template=None if template is None else [template],
            options_field=CHOICES,
            device=device,
            **options,
        )
        if self.ranker.processes.count > 1:
            raise UserError("lm-evaluation-harness runs METRO in one process: leave torchrun out")
        self.method = self.ranker.scored.method
        if self.method == "flipped" and template is None:
            raise UserError(
                "method flipped scores the instruction: give the task's question as template, such "
                "as template='{{premise}} Is it true that {{hypothesis}}?'"
            )
        if self.method != "flipped" and template is not None:
            raise UserError(f"template is for method flipped; {self.method} takes the task's own")
        self._device = self.ranker.processes.device

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """Score each (context, continuation); also, whether a greedy decoder writes the target."""
        scorer = self.ranker.classifier.scorer
        encoded = self._flipped(requests) if self.method == "flipped" else self._plain(requests)
        pairs = [Pair(*each) for each in zip(*encoded, strict=True)]
        scores = scorer.score(pairs)
        found = [(score, not scorer.misses[p]) for score, p in zip(scores, pairs, strict=True)]
        scorer.forget()
        for request, each in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, each)
        return found

    def _plain(self, requests: list) -> tuple[list[tuple], list[tuple]]:
        """Encode sources and targets of the texts, without outer blanks."""
        folds = self.ranker.scored.protocol.fold_whitespace
        encoder, texts = self.ranker.classifier.encoder, []
        for request in requests:
            context, continuation = (
                " ".join(text.split()) if folds else text.strip() for text in request.args
            )
            texts.append(model_texts(self.method, context, continuation, None, None))
        sources, targets = ([each[side] for each in texts] for side in (0, 1))
        return encode_once(sources, encoder.sources), encode_once(targets, encoder.targets)

    def _flipped(self, requests: list) -> tuple[list[tuple], list[tuple]]:
        """Encode the question of each document, with all continuations asked about it."""
        examples = []
        for (name, number, _), group in itertools.groupby(
            requests, lambda request: (request.task_name, request.doc_id, request.args[0])
        ):
            asked = list(group)
            row = {**asked[0].doc, CHOICES: [request.args[1].strip() for request in asked]}
            try:
                [example] = self.ranker.questions.ask(row, number or 0).questions
            except UnusableRow as error:
                raise UserError(f"task {name}, document {number}: {error}") from None
            examples.append(self.ranker.scored.protocol.prepare(example))
        classifier = self.ranker.classifier
        return classifier.sources(examples), classifier.targets(examples)

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        raise NotImplementedError(
            "METRO scores a text given another one; perplexities of whole texts are not defined"
        )

    def generate_until(self, requests: list) -> list[str]:
        """Answer each (context, settings), up to the first of the settings' ``until``."""
        answers = []
        for context, given in (request.args for request in requests):
            sample = {}
            if given.get("do_sample") and given.get("temperature", 1.0) > 0:
                sample = {name: given[name] for name in ("temperature", "top_p") if name in given}
                sample["sample"] = True
            longest = given.get("max_gen_toks", given.get("max_new_tokens"))
            settings = GenerationSettings(max_new_tokens=longest, **sample)
            scored = self.ranker.scored
            [answered] = answer_texts(scored.model, scored.tokenizer, [context], settings)
            text, until = answered.answers[0], given.get("until") or []
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0] if stop else text
            answers.append(text)
            self.cache_hook.add_partial("generate_until", (context, given), text)
        return answers


def main() -> None:
    """Run the harness's command line, which knows ``--model metro`` now."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
