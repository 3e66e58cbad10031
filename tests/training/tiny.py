"""Options of a pretraining run small enough for a test."""

TINY = dict(
    encoder_embed_dim=16,
    encoder_ffn_embed_dim=32,
    encoder_layers=1,
    encoder_attention_heads=2,
    generator_layers=1,
    max_positions=64,
    tokens_per_sample=32,
    sample_break_mode="complete_doc",
    shorten_method="random_crop",
    shorten_data_split_list="train",
    max_tokens=256,
    lr=0.003,
    warmup_updates=2,
    total_num_update=40,
    clip_norm=2.0,
    log_interval=1,
    num_workers=0,
    save_interval_updates=0,
    cpu=True,
    report_to="none",
)
