"""A source of a language stage: which shards, how often, in which form, and what of them is held out."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from onevocab.common.paths import HomePath
from onevocab.data.held_out import LEAST, MOST, VALID
from onevocab.data.shards.remote import placed


class Source(BaseModel):
    """Shards that a stage reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: HomePath = Field(description="shards: a file, a folder, a glob or an address (https://, s3://, ...)")
    repeat: float = Field(1.0, gt=0, description="how often an epoch shows each sample (2.5: twice, and a changing "
                          "half of them once more)")
    weight: float | None = Field(None, gt=0, description="instead of repeat, this source's share of an epoch's samples")
    turns: Literal["auto", "as_is", "captions"] = Field("auto", description="captions: a medium and its text are shown "
                                                        "as a request and its answer, in both directions; auto: so in "
                                                        "instruct when none of its samples is a conversation")
    wordings: HomePath | None = Field(None, description="TOML file of these requests (data/turns.py; default: built "
                                      "in), its path from where the sources' paths start")
    valid: float | None = Field(None, ge=0, le=0.5, description="share of the samples that is held out, never trained "
                                f"on (default: {VALID:.0%}, or about {LEAST} samples where that is more, but at most "
                                f"{MOST:.0%})")
    valid_path: HomePath | None = Field(None, description="shards to be held out in place of a share of these")

    @model_validator(mode="after")
    def _one_way(self):
        if self.valid_path is not None and self.valid is not None:
            raise ValueError("valid and valid_path are both set; held-out samples come from one of them")
        return self

    def placed(self, folder: Path) -> "Source":
        """The same source with its paths, which start from a run's folder, as they are found from here."""
        paths = {name: getattr(self, name) for name in ("path", "valid_path", "wordings")}
        return self.model_copy(update={name: placed(folder, path) for name, path in paths.items() if path is not None})
