"""A model with an opinion, and mails."""

import json

import pytest

TEMPLATE = "What is this mail? {{body}} ||| {{label}}"
OPTIONS = ["complaint", "question", "a praise"]
MAILS = [
    {"id": n, "body": f"My parcel {n} never came, {word} I wait.", "label": OPTIONS[n % 3]}
    for n, word in enumerate("and since still so but yet for or nor as".split())
]


@pytest.fixture(scope="session")
def model(golden):
    return str(golden / "hf_export/metro_tiny_a")


@pytest.fixture
def mails(tmp_path):
    path = tmp_path / "mails.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MAILS))
    return path
