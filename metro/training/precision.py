"""The type of a training run's products on a CPU, where the user leaves it open.

A table of CPU features rather than a measurement: the same machine trains the same way each time.
CPUs with AMX multiply in bfloat16 five to seven times as fast as in float32, those with AVX512_BF16
twice as fast; narrow models gain little, as most of their time is not products
(docs/performance.md has the numbers, of one product and of a step by width).
"""

from metro.ops.dispatch import LEAST_BF16_WIDTH, cpu_multiplies_bf16
from metro.utils.progress import Progress


def choose_precision(args, precision: str, width: int, progress: Progress) -> None:
    """Let ``auto`` mean autocast to bfloat16 on a CPU where that pays, and say so.

    Args:
        args: the Trainer's options, changed before it is made; a GPU's were chosen with them.
        precision: of the settings.
        width: of the model to be trained.
        progress: what to say it to.
    """
    if precision != "auto" or args.device.type != "cpu":
        return
    if width >= LEAST_BF16_WIDTH and cpu_multiplies_bf16():
        args.bf16, args.mixed_precision = True, "bf16"
        progress.say("products in bf16, which this CPU computes faster; --precision fp32: float32")
