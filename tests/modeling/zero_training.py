"""One process of several (``torchrun``): loss, a step of SGD and answers under DeepSpeed's ZeRO-3.

Oracle: the same model in one piece.
"""

import deepspeed
import torch

from tests.modeling.conftest import IDS, LABELS, MASK, answers, tiny

deepspeed.ops.__compatible_ops__.clear()  # whose kernels would be compiled first
deepspeed.init_distributed("gloo")
model, plain, rate = tiny(), tiny(), 0.1
optimizer = torch.optim.SGD(model.parameters(), lr=rate)
config = {
    "train_micro_batch_size_per_gpu": len(IDS),
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
assert all(weight.numel() == 0 for weight in model.parameters())  # each process has its part

found, expected = (each(IDS, MASK, labels=LABELS) for each in (engine, plain))
torch.testing.assert_close(found.loss, expected.loss)
torch.testing.assert_close(found.logits, expected.logits)
engine.backward(found.loss)
engine.step()
expected.loss.backward()
with torch.no_grad():
    for weight in plain.parameters():
        weight -= rate * weight.grad
    engine.eval()
    found, expected = (each(IDS, MASK, labels=LABELS).logits for each in (engine, plain.eval()))
torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
assert torch.equal(answers(model, IDS, MASK, synced_gpus=True), answers(plain, IDS, MASK))
torch.distributed.destroy_process_group()
