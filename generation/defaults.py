"""How a run's replies are drawn unless somebody says otherwise: `RUN/generation.json`, as its `[evaluate]` says."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onevocab.common.errors import UserError, invalid
from onevocab.common.files import read_json
from onevocab.generation.sampling import Sampling
from onevocab.tokenizers.modalities import MODALITIES

FILE = "generation.json"


class GenerationDefaults(BaseModel):
    """temperature, guidance: one number, or one for each modality by its name. Without a file the model samples as it
    is."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    temperature: float | dict[str, float] = 1.0
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    guidance: float | dict[str, float] = 1.0

    @classmethod
    def load(cls, run: Path) -> "GenerationDefaults":
        """Of a run folder. Raises UserError when its file makes no sense."""
        path = run / FILE
        if not path.exists():
            return cls()
        try:
            defaults = cls.model_validate(read_json(path))
            defaults.sampling()
        except ValidationError as error:
            raise invalid(error, path) from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return defaults

    def sampling(self, seed: int = 0, **given) -> Sampling:
        """What is given and not None, else what stands here. A temperature or guidance by modality leaves the others'
        as they are here. Raises UserError on impossible values."""
        chosen = self.model_dump()
        for name, value in given.items():
            if isinstance(value, dict):
                usual = chosen[name]
                value = (usual if isinstance(usual, dict) else dict.fromkeys(("text", *MODALITIES), usual)) | value
            if value is not None:
                chosen[name] = value
        return Sampling(seed=seed, **chosen)
