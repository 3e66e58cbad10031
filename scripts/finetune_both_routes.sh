#!/usr/bin/env bash
# Prompt-finetunes one METRO pretraining checkpoint twice, with fairseq and with the Trainer of
# Hugging Face, and evaluates both results on held-out rows (OUT/results). Sizes are for a CPU.
#
#   scripts/finetune_both_routes.sh CHECKPOINT.pt VOCAB OUT [DATA_DIR] [TEMPLATES]
#
# VOCAB: folder with dict.txt and sp.model of the checkpoint. DATA_DIR: local rows (default: the hub);
# TEMPLATES: a promptsource tree (default: what `metro templates fetch` got). Steps whose
# results are there are left out, and stopped ones are resumed.
# Settings from the environment: DATASETS, UPDATES, TOKENS (of a fairseq batch), BATCH (examples of a
# Trainer's batch), LIMIT (held-out rows per dataset), RATE, LENGTH (encoder tokens).
set -euo pipefail

if [ $# -lt 3 ]; then
  sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
checkpoint=$(realpath "$1") vocab=$(realpath "$2") out=$(realpath -m "$3")
sources=()
[ -n "${4:-}" ] && sources+=(--data-dir "$(realpath "$4")")
[ -n "${5:-}" ] && sources+=(--templates "$(realpath "$5")")
cd "$(dirname "$0")/.." # the user dir of fairseq is given relative to the project
export OMP_WAIT_POLICY=passive

read -r -a datasets <<<"${DATASETS:-ag_news rotten_tomatoes trec glue/qqp paws/labeled_final quartz quarel sciq social_i_qa}"
updates=${UPDATES:-3000} rate=${RATE:-0.0005} length=${LENGTH:-64}
chosen=()
for name in "${datasets[@]}"; do chosen+=(--dataset "$name"); done
common=("${chosen[@]}" ${sources[@]+"${sources[@]}"} --validation all --valid-limit "${LIMIT:-100}")

echo "== prompts: binarised for fairseq, as text for the Trainer and the evaluation"
[ -f "$out/ids/prompts.json" ] || metro prepare-prompts --mixture t0 "${common[@]}" --vocab "$vocab" --out "$out/ids"
[ -f "$out/text/prompts.json" ] || metro prepare-prompts --mixture t0 "${common[@]}" --out "$out/text"

# The model's sizes, as options of fairseq; the sentinels are as many as the pretraining had.
sizes=$(python - "$checkpoint" "$vocab" <<'PY'
import sys
import metro
model, tokenizer = metro.load(sys.argv[1], vocab=sys.argv[2])
c = model.config
print(f"model.encoder_embed_dim={c.d_model} model.encoder_ffn_embed_dim={c.d_ff}",
      f"model.encoder_layers={c.num_layers} model.encoder_attention_heads={c.num_heads}",
      f"++model.decoder_layers={c.num_decoder_layers} model.max_positions={c.max_positions}",
      f"++model.encoder_rp_bins={c.relative_attention_num_buckets}",
      f"++model.encoder_rp_max_dist={c.relative_attention_max_distance}",
      f"task.tokens_per_sample={tokenizer.n_sentinel_tokens}")
PY
)

echo "== fairseq: $updates updates"
# shellcheck disable=SC2086  # sizes are several words
fairseq-hydra-train --config-dir fairseq_plugins/configs/finetuning --config-name metro_t0_tiny \
  task.data="$out/ids" checkpoint.finetune_from_model="$checkpoint" \
  checkpoint.save_dir="$out/fairseq" $sizes \
  ++task.max_source_tokens="$length" dataset.max_tokens="${TOKENS:-2000}" \
  optimization.max_update="$updates" optimization.lr="[$rate]" \
  lr_scheduler.warmup_updates=$((updates / 10)) dataset.validate_interval_updates="$updates"
[ "$out/fairseq_hf/config.json" -nt "$out/fairseq/checkpoint_last.pt" ] ||
  metro convert to-hf "$out/fairseq/checkpoint_last.pt" --out "$out/fairseq_hf" --overwrite

echo "== Trainer: $updates updates"
metro finetune --config tiny --model "$checkpoint" \
  --vocab "$vocab" --data "$out/text" --output-dir "$out/trainer" --max-steps "$updates" \
  --batch-size "${BATCH:-32}" --learning-rate "$rate" --warmup-steps $((updates / 10)) \
  --max-input-length "$length" --eval-steps "$updates" --eval-limit 10 --report-to none

echo "== held-out rows"
for route in fairseq_hf trainer; do
  metro evaluate "$out/$route" --suite "$out/text" --limit 40 --max-source-length "$length" \
    --out "$out/results" --run-name "$route" --overwrite
done
