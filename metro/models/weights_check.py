"""Whether weights are those of a model: everything that is wrong, in one message."""

from collections.abc import Mapping

import torch

from metro.utils.messages import UserError

MOST_NAMES = 60
"""Of one kind of mistake; more are counted."""


def expected_shapes(model_class, *arguments) -> dict[str, torch.Size]:
    """Names and shapes of a model's tensors, without memory for them."""
    with torch.device("meta"):
        model = model_class(*arguments)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def check_weights(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size], source: str, model: str
) -> None:
    """Raise a ValueError that lists all missing, unexpected and wrongly shaped tensors.

    Args:
        state: the tensors that were found.
        expected: names and shapes that the model has.
        source: the file or folder, for the message.
        model: what the weights should be of, for the message.
    """
    complain(
        missing=[name for name in expected if name not in state],
        unexpected=[name for name in state if name not in expected],
        wrong_shapes=[
            f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name])}"
            for name, tensor in state.items()
            if name in expected and tensor.shape != expected[name]
        ],
        source=source,
        model=model,
    )


def complain(
    missing: list[str], unexpected: list[str], wrong_shapes: list[str], source: str, model: str
) -> None:
    """Raise where any of the three lists has an entry."""
    parts = [
        f"{kind}: {_join(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", wrong_shapes),
        )
        if names
    ]
    if parts:
        raise UserError(
            f"the weights in {source} are not those of {model}; {'; '.join(parts)}. The settings "
            "or the weights belong to another model, or the file is incomplete: take both from the "
            "same source"
        )


def _join(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
