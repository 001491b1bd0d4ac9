"""The shape of a decoder."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from onevocab.common.paths import HomePath


class ModelConfig(BaseModel):
    """Qwen3's dense architecture; the vocabulary's size comes from the vocabulary, not from here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: int = Field(128, gt=0, description="width of the residual stream")
    layers: int = Field(5, gt=0, description="number of layers")
    heads: int = Field(4, gt=0, description="query heads")
    kv_heads: int = Field(2, gt=0, description="key and value heads; a divisor of heads")
    head_dim: int = Field(32, gt=0, description="width of one head; heads * head_dim need not be dim")
    mlp_dim: int = Field(384, gt=0, description="width between the matrices of a layer's MLP")
    rope_theta: float = Field(1e4, gt=1, description="base of the rotary frequencies; larger for longer sequences")
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square in every RMSNorm")
    tie_embeddings: bool = Field(True, description="one matrix is both the embedding and the head")
    max_length: int = Field(1024, gt=0, description="longest sequence, in tokens")

    @model_validator(mode="after")
    def _fits(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary positions turn pairs")
        return self


NOT_SHAPE = {"init", "code_features"}


class ModelSection(ModelConfig):
    """[model]: a shape, or `init`, which has one; and how its rows are trained."""

    init: HomePath | None = Field(None, description="a Hugging Face Qwen3 folder, whose shape and weights are the "
                                  "start")
    code_features: int = Field(128, ge=0, description="in training, numbers that describe a code's vector, from which "
                               "its row of embedding and head is made; 0: each code has a row of its own alone")

    @property
    def shape(self) -> ModelConfig:
        """Without what is no part of the trained model."""
        return ModelConfig(**self.model_dump(exclude=NOT_SHAPE))
