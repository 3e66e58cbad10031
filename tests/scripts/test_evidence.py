"""The comparison of pretraining objectives: statistics by hand, the committed plan, a whole run."""

import json
import subprocess
import sys

import numpy as np
import pytest

from metro.utils.files import read_json, read_yaml
from metro.utils.messages import UserError
from tests.conftest import ROOT
from tests.data.prepared import random_text

SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))
from evidence_report import difference, read_results, write_report  # noqa: E402

PLAN = ROOT / "benchmarks/evidence/cpu.yaml"


def arm(rows: dict[int, str]) -> dict:
    return {seed: {"task": np.array([*map(int, right)], float)} for seed, right in rows.items()}


def test_difference_is_the_mean_of_seeds_that_both_arms_have():
    """Oracle: by hand: +50 and 0 points; seed 3 has no partner."""
    first = arm({1: "1111", 2: "1010", 3: "0000"})
    found = difference(first, arm({1: "1010", 2: "0101"}), ["task"])
    assert (found.mean, found.per_seed) == (25.0, [50.0, 0.0])
    assert found.low < 25 < found.high
    assert difference(first, arm({4: "1111"}), ["task"]) is None


def test_interval_is_that_of_drawing_seeds_and_examples_one_by_one():
    """Oracle: the same bootstrap in plain loops; 2,000 resamples leave about 1.5 points.

    All seeds are tested on the same examples, which are drawn once for all.
    """
    random = np.random.default_rng(5)
    firsts, seconds = random.random((3, 40)) < 0.8, random.random((3, 40)) < 0.6
    arms = [
        {seed: {"task": rows[seed].astype(float)} for seed in range(3)}
        for rows in (firsts, seconds)
    ]
    means = []
    for _ in range(2000):
        drawn, examples = [], random.integers(40, size=40)
        for seed in random.integers(3, size=3):
            for example in examples:
                drawn.append(int(firsts[seed, example]) - int(seconds[seed, example]))
        means.append(100 * np.mean(drawn))
    found = difference(*arms, ["task"])
    assert [found.low, found.high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=2)


def test_pairing_takes_out_what_examples_have_in_common():
    """Oracle: arms that differ in one example of 100 in every seed differ by at most a few."""
    easy = "1" * 60 + "0" * 39
    found = difference(
        arm({1: easy + "1", 2: easy + "1"}), arm({1: easy + "0", 2: easy + "0"}), ["task"]
    )
    assert found.mean == pytest.approx(1) and 0 <= found.low and found.high <= 4
    same = difference(arm({1: easy}), arm({1: easy}), ["task"])
    assert same[:3] == (0, 0, 0)


def test_committed_plan_names_configurations_and_arms_that_exist():
    plan = read_yaml(PLAN)
    configs = ROOT / "fairseq_plugins/configs/pretraining"
    for options in plan["arms"].values():
        configuration = read_yaml(configs / f"{options['configuration']}.yaml")
        for name in {**plan["pretraining"], **options.get("set", {})}:
            assert name.split(".")[0] in configuration
        assert options.get("untrained") or "rates_of" in options or len(options["rates"]) == 3
        assert options.get("rates_of", "metro") in plan["arms"]
        own = options.get("set", {})  # the criterion refuses a head that is not trained
        assert (own.get("criterion.rtd_loss_weight") == 0) == (own.get("model.rtd_head") == "none")
        assert options.get("time_of", "metro") in plan["arms"]
    assert {name for pair in plan["compare"] for name in pair} <= plan["arms"].keys()
    assert len(plan["seeds"]) >= 5 and plan["tuning_seed"] not in plan["seeds"]
    assert len(plan["datasets"]) >= 6 and plan["endpoint"] and plan["primary"] >= 1
    for name, options in plan["objectives"]["datasets"].items():
        seen, unseen = (
            each["answer_choices"].split(" ||| ") for each in (plan["datasets"][name], options)
        )
        assert len(seen) == len(unseen) and not {*seen} & {*unseen}
        for prompt in options["prompts"]:  # what is behind the text may be cut off
            assert "LABELS" in prompt.partition("{{text}}")[0]


def test_a_folder_belongs_to_one_plan(tmp_path):
    """Oracle: the endpoint cannot change once runs have begun; further seeds can be added."""
    from evidence_data import prepare

    (tmp_path / "text.txt").write_text(random_text(3, 300))
    plan = {"endpoint": "x", "vocab_size": 200, "valid_fraction": 0.1, "datasets": {}, "seeds": [1]}
    prepare(plan, tmp_path / "text.txt", tmp_path, tmp_path)
    prepare({**plan, "seeds": [1, 2], "reading": "z"}, tmp_path / "text.txt", tmp_path, tmp_path)
    with pytest.raises(UserError, match="has endpoint 'x', not 'y'"):
        prepare({**plan, "endpoint": "y"}, tmp_path / "text.txt", tmp_path, tmp_path)


def test_published_results_belong_to_what_the_plan_says_of_their_arm(tmp_path):
    """Oracle: each change that could give another number is noticed, titles and rates are not."""
    from evidence import Study
    from evidence_runs import plan_digest

    plan = read_yaml(PLAN)
    path = tmp_path / "metro-0.001-s1.json"
    path.write_text(json.dumps({"arm": "metro", "plan": plan_digest(plan, "metro")}))

    def study(**changes) -> Study:
        arms = {**plan["arms"], "metro": {**plan["arms"]["metro"], **changes}}
        return Study({**plan, "arms": arms}, tmp_path, tmp_path, tmp_path, tmp_path)

    assert study(title="another", rates=[1.0]).published("metro") is not None
    with pytest.raises(UserError, match="metro-0.001-s1.json was made when the plan"):
        study(set={"criterion.rtd_loss_weight": 10.0}).published("metro")
    for key in ("updates", "blimp_limit", "valid_fraction"):
        assert plan_digest({**plan, key: 7}, "metro") != plan_digest(plan, "metro")
    start = {**plan["arms"], "t5_time": {**plan["arms"]["t5_time"], "set": {"a": 1}}}
    for arm, differs in (("flipped", True), ("metro", False)):  # FLIPPED starts from T5
        assert (plan_digest({**plan, "arms": start}, arm) != plan_digest(plan, arm)) == differs


def test_an_arm_without_a_choice_is_not_tuned(tmp_path):
    """Oracle: nothing is run, which would need data."""
    from evidence import Study, best
    from evidence_runs import PretrainingRun

    study = Study(read_yaml(PLAN), tmp_path, tmp_path, tmp_path, tmp_path)
    run = PretrainingRun(study, "metro", 100, 0.002, 0.001, True)
    assert best([run]) == [run] and not any(tmp_path.iterdir())


def test_published_results_are_of_the_committed_plans():
    from evidence_runs import plan_digest

    plan, paths = read_yaml(PLAN), [*(ROOT / "benchmarks/results/evidence/cpu").glob("*.json")]
    for found in map(read_json, paths):
        assert found["plan"] == plan_digest(plan, found["arm"])
    assert len(paths) > 25


def result(name: str, seed: int, right: str, blimp: float) -> dict:
    pairs = {"decoder": {"question": "blanks", "paradigms": {"a": blimp, "b": blimp}}}
    return {
        "arm": name, "seed": seed, "rate": 0.001, "finetuning_rate": 0.0005,
        "seconds_per_update": 0.6, "updates": 100,
        "tokens_per_update": {"a": 1000.0, "b": 3000.0}[name],  # b counts something else
        "valid": {
            "nll_loss": [[50, 100], [8.0, 7.25]], "generator_loss": [[50, 100], [7.0, 6.5]],
            "rtd_loss": [[50, 100], [0.8, 0.7]], "rtd_label_entropy": [[50, 100], [0.8, 0.8]],
            "rtd_replaced_accuracy": [[50, 100], [5.0, 9.0]],
            "replaced_accuracy": [[50, 100], [1.0, 3.0]],
            "unigram_bits": [[100], [9.0]], "bigram_bits": [[100], [6.75]],
            "trigram_bits": [[100], [6.25]],
        },
        "blimp": pairs, "right": {"colours": right},
    }  # fmt: skip


def test_page_has_the_numbers_of_the_results(tmp_path):
    """Oracle: by hand."""
    plan = {
        "about": "Toys.", "endpoint": "colours.", "limits": "All.", "primary": 1, "blimp_limit": 7,
        "reading": "A wins.",
        "arms": {"a": {"title": "A", "rtd": True}, "b": {"title": "B"}, "c": {"title": "not run"}},
        "compare": [["a", "b"], ["a", "c"]], "datasets": {"colours": {}},
        "objectives": {
            "about": "Both.", "datasets": {"colours": {}}, "compare": [["f", "d"]],
            "arms": {"f": {"title": "F"}, "d": {"title": "D"}},
        },
    }  # fmt: skip
    for name, seen, unseen in (("f", "2121", "1111"), ("d", "2020", "2200")):  # of two prompts
        right = {"colours": seen, "colours, unseen": unseen}
        rates = {"rate": 0.001, "finetuning_rate": 0.0005}
        facts = {"arm": name, "seed": 1, **rates, "prompts": 2, "right": right}
        (tmp_path / f"{name}.json").write_text(json.dumps(facts))
    made = [
        ("a", 1, "1110", 0.6),
        ("a", 2, "1111", 0.7),
        ("b", 1, "0110", 0.5),
        ("b", 2, "1111", 0.5),
    ]
    for name, seed, right, blimp in made:
        facts = result(name, seed, right, blimp)
        if (name, seed) == ("a", 2):
            shares = {"recall": 30.0, "false_alarms": 3.0, "restored": 8.0}
            facts["probe"] = {**shares, "restored_by_bigram": 9.0}
        (tmp_path / f"{name}{seed}.json").write_text(json.dumps(facts))
    write_report(plan, read_results(tmp_path), tmp_path / "docs/evidence.md")
    page = (tmp_path / "docs/evidence.md").read_text()
    assert "| A | 2 | 0.001, 0.0005 | 100 | 0.10 | 1.0 | 7.25 | 65.0 [60.0, 70.0] |  |" in page
    assert "mean over 2 paradigms of at most 7 pairs" in page
    assert "| B | 2 | 0.001, 0.0005 | 100 | 0.10 |" in page
    learnt = page.partition("## What A has learnt")[2].partition("##")[0]
    for to_pass, at in (
        ("unigram 9.000", "0.1"),
        ("bigram 6.750", "0.1"),
        ("trigram 6.250", "never"),
    ):
        assert f"| 6.500 | {to_pass} | {at} |" in learnt
    assert "| 0.875 | 0.900 | 0.1 |" in learnt and "detects, % | 9.0 |" in learnt
    assert "at 3.0 % false alarms, % | 30.0 | 20 |" in learnt  # of the one run that was probed
    assert "best other token, % | 8.0 | bigram 9.0 |" in learnt
    assert "A wins." in page and "What B has learnt" not in page
    assert "| A | 87.5 | 87.5 |" in page and "| B | 75.0 | 75.0 |" in page
    assert "| A − B | +12.5 [" in page and "+25.0 +0.0" in page and "not run" not in page
    assert "| F | 75.0 | 75.0 |" in page and "| D | 50.0 | 50.0 |" in page
    assert "| F − D | +25.0 [" in page and "| F − D | +0.0 [-50.0, +50.0] |" in page
    assert "] | +25.0 |\n" in page  # of the only seed
    assert "6 runs; seeds" in page and "A: 1, 2 (0.001 and 0.0005); B: 1, 2" in page
    assert "F: 1 (0.001 and 0.0005); D: 1 (0.001 and 0.0005)" in page
    first = (tmp_path / "docs/images/evidence.svg").read_bytes()
    write_report(plan, read_results(tmp_path), tmp_path / "docs/evidence.md")
    assert (tmp_path / "docs/images/evidence.svg").read_bytes() == first


TINY = """
about: Toys.
endpoint: colours.
limits: All.
cpu: true
vocab_size: 200
valid_fraction: 0.1
updates: 4
tuning_updates: 2
validate_every: 2
seeds: [1]
tuning_seed: 9
blimp_limit: 3
pretraining:
  task.tokens_per_sample: 32
  dataset.max_tokens: 256
  lr_scheduler.warmup_updates: 1
  model.encoder_embed_dim: 16
  model.encoder_ffn_embed_dim: 16
  model.encoder_layers: 1
  model.encoder_attention_heads: 2
  model.max_positions: 32
arms:
  metro: {title: METRO, configuration: metro_t5_tiny, rtd: true, rates: [0.001]}
  t5: {title: T5, configuration: t5_tiny, time_of: metro, rates: [0.001]}
  none: {title: nothing, configuration: metro_t5_tiny, untrained: true}
  light:
    title: RTD 10
    configuration: metro_t5_tiny
    rtd: true
    set: {criterion.rtd_loss_weight: 11.0}
    rates_of: metro
compare: [[metro, t5], [metro, none]]
primary: 1
finetuning: {rates: [0.001, 0.0005], max_steps: 2, max_input_length: 32, max_target_length: 8}
datasets:
  colours:
    dataset: colours
    train: train
    test: test
    prompt: "{{thing}} ||| {{answer_choices[label]}}"
    answer_choices: red ||| green
objectives:
  about: Both ways.
  from: metro
  arms:
    flipped: {title: FLIPPED, set: {objective: flipped}}
    direct: {title: DIRECT, set: {objective: direct}}
  compare: [[flipped, direct]]
  datasets:
    colours:
      prompts:
        - "{{thing}} Is it LABELS? ||| {{answer_choices[label]}}"
        - "LABELS? {{thing}} ||| {{answer_choices[label]}}"
      answer_choices: blue ||| grey
"""


@pytest.mark.slow
@pytest.mark.fairseq
def test_a_whole_plan_runs_resumes_and_reports(tmp_path):
    """Oracle: what is published at the end, and that a second call makes nothing anew."""
    rows = tmp_path / "rows"
    (rows / "colours/default").mkdir(parents=True)
    (rows / "blimp").mkdir()
    for split, number in (("train", 20), ("test", 6)):
        lines = [json.dumps({"thing": f"thing {n}", "label": n % 2}) for n in range(number)]
        (rows / f"colours/default/{split}.jsonl").write_text("\n".join(lines) + "\n")
    pair = json.dumps({"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps."})
    (rows / "blimp/causative.jsonl").write_text(f"{pair}\n" * 4)
    (tmp_path / "plan.yaml").write_text(TINY)
    (tmp_path / "out").mkdir()  # such small models cannot be timed
    (tmp_path / "out/timing.json").write_text(
        json.dumps({"metro": 0.03, "t5": 0.01, "light": 0.03})
    )
    (tmp_path / "text.txt").write_text(random_text(3, 600))
    argv = [
        sys.executable, SCRIPTS / "evidence.py", tmp_path / "plan.yaml",
        "--text", tmp_path / "text.txt", "--data-dir", rows, "--out", tmp_path / "out",
        "--results", tmp_path / "results", "--page", tmp_path / "page.md",
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = {
        path.stem.split("-")[0]: read_json(path) for path in (tmp_path / "results").iterdir()
    }
    assert results.keys() == {"metro", "t5", "none", "light", "flipped", "direct"}
    assert {run["arm"] for run in results.values() if "probe" in run} == {"metro", "light"}
    assert results["light"]["rate"] == results["metro"]["rate"]
    assert all(run["cost"]["seconds"] > 0 and run["cost"]["cpu"] for run in results.values())
    for objective in ("flipped", "direct"):  # 6 rows, each right under 0 to 2 prompts
        found = results.pop(objective)
        assert found["prompts"] == 2
        for name in ("colours", "colours, unseen"):
            assert len(found["right"][name]) == 6 and {*found["right"][name]} <= {*"012"}
    unseen = (tmp_path / "out/tasks/objectives/unseen.yaml").read_text()
    assert "Is it blue or grey?" in unseen and "red" not in unseen
    assert all(len(run["right"]["colours"]) == 6 for run in results.values())
    assert results["metro"]["blimp"].keys() == {"decoder", "rtd"}
    assert results["t5"]["blimp"]["decoder"]["question"] == "blanks"
    assert results["t5"]["updates"] == 12
    page = (tmp_path / "page.md").read_text()
    assert "| METRO − T5 |" in page and page.count("| FLIPPED − DIRECT |") == 2
    again = subprocess.run(argv, capture_output=True, text=True)
    assert again.returncode == 0 and "-s1" not in again.stdout
    (tmp_path / "out").rename(tmp_path / "elsewhere")  # another machine has the results alone
    flipped = tmp_path / "results/flipped-0.001-s1.json"
    lost = read_json(flipped)
    flipped.unlink()
    (tmp_path / "plan.yaml").write_text(TINY.replace("seeds: [1]", "seeds: [1, 2]"))
    further = subprocess.run(argv, capture_output=True, text=True)
    assert further.returncode == 0, further.stderr
    assert read_json(flipped) | {"cost": None} == lost | {"cost": None}
    made = {line.split()[1][:-1] for line in further.stdout.splitlines() if "-s" in line}
    anew = {f"{arm}-0.001-{seed}" for arm in ("metro", "flipped") for seed in ("s1", "s9-tuning")}
    assert {name for name in made if "-s2" not in name} == anew
    for name, first in results.items():
        second = read_json(tmp_path / f"results/{name}-{first['rate']:g}-s2.json")
        assert all(second[key] == first[key] for key in ("seconds_per_update", "updates"))
