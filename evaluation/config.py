"""How much is evaluated, and how replies are drawn."""

from pydantic import BaseModel, ConfigDict, Field, create_model

from onevocab.tokenizers.modalities import MODALITIES

DEMO_TASKS = "onevocab.demo.tasks"

Temperatures = create_model("Temperatures", __config__=ConfigDict(frozen=True, extra="forbid"), **{
    name: (float, Field(0.0 if name == "text" else 0.7, ge=0, description=f"temperature of {name}"))
    for name in ("text", *MODALITIES)})

Guidance = create_model("Guidance", __config__=ConfigDict(frozen=True, extra="forbid"), **{
    name: (float, Field(1.0, ge=0, description=f"classifier-free guidance of {name}; 1 is none"))
    for name in MODALITIES})


class EvaluateConfig(BaseModel):
    """The `[evaluate]` section. Counts are items; every split of a task is cut to `--limit` when that is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: str | None = Field(None, description="the module whose TASKS are asked, by its dotted name (default: the "
                              "demo's where the run has its world, else those of evaluation/own_data.py: the run's "
                              "own held-out samples)")
    seed: int = Field(0, description="of the items")
    batch: int = Field(64, ge=1, description="prompts that are answered at once")
    captions: int = Field(150, ge=1, description="items of descriptions and drawings; enough that every name appears")
    items: int = Field(96, ge=1, description="items of each other task")
    controls: int = Field(64, ge=1, description="items of each control: shuffled media, unseen style or voice")
    clips: int = Field(300, ge=1, description="clips that are heard under every condition: silence, noise, ...")
    wants: int = Field(8, ge=1, description="prompts of each wording for which the model chooses what to answer with")
    reconstructions: int = Field(200, ge=1, description="media that are encoded and decoded again")
    malformed: int = Field(1000, ge=1, description="replies that are drawn hot and checked for their form")
    malformed_temperature: float = Field(1.5, ge=0, description="temperature of these replies")
    temperature: Temperatures = Temperatures()
    max_text_tokens: int = Field(128, ge=8, description="longest text that is answered")
    top_k: int = Field(0, ge=0, description="only the k likeliest ids (0: all)")
    top_p: float = Field(1.0, gt=0, le=1, description="the likeliest ids up to this mass (1: all)")
    guidance: Guidance = Guidance()
    judge_steps: int = Field(220, ge=20, description="training steps of the picture judge")
    judge_floor: float = Field(0.5, ge=0, le=1, description="probability below which the picture judge answers that "
                               "nothing is there")
    candidates: int = Field(20, ge=2, description="phrases among which the speech judge decides")
    gallery: int = Field(16, ge=1, description="drawings shown, of seeds 0, 1, ...; never selected")

    @property
    def sampling(self) -> dict:
        """How replies are drawn, as `AnyToAny.generate` takes it, and as the run's generation.json says."""
        return self.model_dump(include={"temperature", "top_k", "top_p", "guidance"})
