"""Configuration of METRO-T5, with the field names of Hugging Face T5 and of the released models."""

from transformers import PretrainedConfig

_SIZES = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads"),
    *("max_positions", "relative_attention_num_buckets", "relative_attention_max_distance"),
)


class MetroT5Config(PretrainedConfig):
    """Sizes and constants of METRO-T5 (Gong et al., ACL 2023, section 4 and appendix A).

    Post-LayerNorm Transformer with learned absolute positions in encoder and decoder, a LayerNorm
    after the embedding, and a bucketed relative position bias per encoder layer (none in the
    decoder). All embeddings and the output projection are one matrix.

    Args:
        vocab_size: entries of the vocabulary, special symbols and sentinels included.
        d_model: width of the hidden states.
        d_kv: width of one attention head; ``num_heads * d_kv`` equals ``d_model`` in all released
            models.
        d_ff: width of the feed-forward layer.
        num_layers: encoder layers.
        num_decoder_layers: decoder layers; ``None`` means as many as the encoder has.
        num_heads: attention heads of every attention.
        relative_attention_num_buckets: rows of each relative position bias table.
        relative_attention_max_distance: distance in tokens from which on all keys share one bucket.
        max_positions: longest sequence; the position tables have ``max_positions + pad_token_id +
            1`` rows.
        dropout_rate: after the embedding and on the output of every attention and feed-forward
            layer.
        attention_dropout_rate: on attention weights; ``None`` means ``dropout_rate``.
        activation_dropout_rate: after the feed-forward activation.
        feed_forward_proj: the activation, ``"relu"`` or ``"gelu"``.
        layer_norm_epsilon: epsilon of every LayerNorm.
        initializer_factor: multiplies the standard deviation of freshly drawn weights.
        decoder_start_token_id: ``</s>`` after prompt-finetuning, ``<sen000>`` after pretraining
            only.

    Raises:
        ValueError: a size that cannot be built, naming the field and its value.
    """

    model_type = "metro_t5"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_decoder_layers",  # generate() makes a cache of this many layers
        "head_dim": "d_kv",
    }

    def __init__(
        self,
        vocab_size: int = 33280,
        d_model: int = 768,
        d_kv: int = 64,
        d_ff: int = 3072,
        num_layers: int = 12,
        num_decoder_layers: int | None = None,
        num_heads: int = 12,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        max_positions: int = 1024,
        dropout_rate: float = 0.1,
        attention_dropout_rate: float | None = None,
        activation_dropout_rate: float = 0.0,
        feed_forward_proj: str = "relu",
        layer_norm_epsilon: float = 1e-5,
        initializer_factor: float = 1.0,
        use_cache: bool = True,
        bos_token_id: int = 0,
        pad_token_id: int = 1,
        eos_token_id: int = 2,
        decoder_start_token_id: int = 2,
        is_encoder_decoder: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.d_kv = d_kv
        self.d_ff = d_ff
        self.num_layers = num_layers
        self.num_decoder_layers = num_layers if num_decoder_layers is None else num_decoder_layers
        self.num_heads = num_heads
        self.relative_attention_num_buckets = relative_attention_num_buckets
        self.relative_attention_max_distance = relative_attention_max_distance
        self.max_positions = max_positions
        self.dropout_rate = dropout_rate
        self.attention_dropout_rate = (
            dropout_rate if attention_dropout_rate is None else attention_dropout_rate
        )
        self.activation_dropout_rate = activation_dropout_rate
        self.feed_forward_proj = feed_forward_proj
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_factor = initializer_factor
        self.use_cache = use_cache
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; use a whole number of at least 1")
        if feed_forward_proj not in ("relu", "gelu"):
            raise ValueError(f"feed_forward_proj is {feed_forward_proj!r}; use 'relu' or 'gelu'")
        half = relative_attention_num_buckets // 2
        if relative_attention_num_buckets < 4 or relative_attention_num_buckets % 2:
            raise ValueError(
                f"relative_attention_num_buckets is {relative_attention_num_buckets}; "
                "use an even number of at least 4"
            )
        if relative_attention_max_distance <= half:
            raise ValueError(
                f"relative_attention_max_distance is {relative_attention_max_distance}; it must be "
                f"larger than half of relative_attention_num_buckets ({half})"
            )
        if not tie_word_embeddings:
            raise ValueError("tie_word_embeddings is False; METRO-T5 has one embedding matrix")
        super().__init__(
            bos_token_id=bos_token_id,
            pad_token_id=pad_token_id,
            eos_token_id=eos_token_id,
            decoder_start_token_id=decoder_start_token_id,
            is_encoder_decoder=is_encoder_decoder,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
