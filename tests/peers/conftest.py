"""The marks that transformers' tests carry, which mean nothing here."""

MARKS = ["accelerate_tests", "generate", "torch_compile_test"]
MARKS += [f"flash_attn_{version}test" for version in ("", "3_", "4_")]


def pytest_configure(config):
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers' tests")
