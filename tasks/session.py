"""What the tasks of one module share while a model is evaluated: judges, and the model's tokenizers."""

from pathlib import Path


class Session:
    """A tasks module may give a subclass as `SESSION`.

    hot: names of the tasks whose prompts the check for malformed replies uses (none: all). examples: names of tasks, of
    which the first that was answered gives the files to try the model with (none: the first of all).
    """

    hot: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()

    def __init__(self, folder: Path, config, tokenizers, notes: list[str]):
        """folder: for what judges keep; config: evaluation's EvaluateConfig; tokenizers: the model's, their `media` by
        name; notes: lines for the report, to which a session adds its own."""
        self.folder, self.config, self.tokenizers, self.notes = Path(folder), config, tokenizers, notes

    def through_tokenizer(self, modality: str, sources: list) -> list:
        """Media encoded to codes and decoded again."""
        tokenizer = self.tokenizers.media[modality]
        return tokenizer.decode_batch(tokenizer.encode_batch(sources))

    def reconstructions(self, count: int) -> tuple[list[dict], dict]:
        """What the tokenizers lose: rows of the report (evaluation's `metrics.row`), and cards by Section."""
        return [], {}

    def closing(self) -> list[str]:
        """Notes that come last."""
        return []

    def judges(self) -> dict:
        """What the report says about the judges."""
        return {}
