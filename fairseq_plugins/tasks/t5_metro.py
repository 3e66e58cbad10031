"""Task `t5_metro`: masked text for the auxiliary model, the original as the decoder's target."""

from dataclasses import dataclass

from fairseq.logging import metrics
from fairseq.tasks import register_task

from fairseq_plugins.option import config_option, options_of
from fairseq_plugins.tasks._pretraining import OF_T5, PretrainingConfig, PretrainingTask
from metro.data.prepared_folder import TEXT_MANIFEST
from metro.data.text.ngrams import NAMES
from metro.pretraining.settings import TaskOptions, check_shares
from metro.utils.files import read_json
from metro.utils.messages import UserError


@dataclass
@options_of(TaskOptions, without=OF_T5, mask_multiple_length=1)
class T5MetroConfig(PretrainingConfig):
    mask_stdev: float = config_option(0.0, "only 0 is implemented")


@register_task("t5_metro", dataclass=T5MetroConfig)
class T5MetroTask(PretrainingTask):
    """METRO pretraining."""

    is_metro = True

    def __init__(self, cfg: T5MetroConfig, dictionary):
        super().__init__(cfg, dictionary)
        if cfg.mask_stdev != 0:
            raise UserError(
                f"mask_stdev is {cfg.mask_stdev}; masks of random length are not implemented "
                "(no published run used them): set it to 0"
            )
        check_shares(cfg, "leave_unmasked_prob", "random_token_prob")
        manifest = read_json(self.folders[0] / TEXT_MANIFEST) or {}
        self.reference_bits = manifest.get("reference_bits") or {}

    def reduce_metrics(self, logging_outputs, criterion):
        super().reduce_metrics(logging_outputs, criterion)
        if not criterion.training:  # lines to see the validation loss against
            for name in NAMES:
                if name in self.reference_bits:
                    metrics.log_scalar(f"{name}_bits", self.reference_bits[name], round=3)
