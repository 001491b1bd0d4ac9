"""A model that answers as it is told, to test the chat with; `python chatting.py FOLDER` chats with it."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from onevocab.common.errors import cli
from onevocab.generation.chat import Chat
from onevocab.generation.terminal import way_to_show
from onevocab.tokenizers.document import Segment
from onevocab.tokenizers.modalities import modality_of_value
from onevocab.tokenizers.vocabulary import Vocabulary

PICTURE = (4, 4)  # codes


class FakeModel:
    """A word is a token; a picture takes 20, a sound 12. "slow" is answered word by word, for ever; "draw" with a
    picture, after which "draw on" goes on for ever; "wait" not at all, "cut" with an answer that the limit ended, "esc"
    with an order to the terminal; anything else is repeated."""

    def __init__(self, context_length: int = 100):
        layouts = [{"name": "image", "sizes": 8, "codes": 16, "rows": 0},
                   {"name": "audio", "sizes": 0, "codes": 16, "rows": 2}]
        self.vocab, self.context_length = Vocabulary.build(256, layouts), context_length
        self.asked = []  # the messages of each call
        self.options = []

    def longest_reply(self, want="any"):
        return {"image": 20, "audio": 40}.get(want, 64)

    def _segment(self, part):
        if isinstance(part, Segment | str):
            return part if isinstance(part, Segment) else Segment("text", part)
        kind = modality_of_value(part)
        return Segment(kind, np.zeros(PICTURE if self.vocab.spans[kind].sized else (5, 2), np.int64))

    def encode(self, prompt):
        prompt = prompt if isinstance(prompt[0], dict) else [{"role": "user", "content": prompt}]
        return [{"role": message["role"], "content": [self._segment(part) for part in
                 (message["content"] if isinstance(message["content"], list) else [message["content"]])]}
                for message in prompt]

    def count_tokens(self, prompt):
        return 2 + sum(2 + sum(len(part.content.split()) if part.modality == "text" else
                               self.vocab.spans[part.modality].tokens(part.content.shape)
                               for part in message["content"]) for message in self.encode(prompt))

    def stream(self, prompt, **options):
        self.asked.append(prompt)
        self.options.append(options)
        word = "".join(part.content for part in prompt[-1]["content"] if part.modality == "text")
        segments = [Segment("text", word)]
        if word == "wait":
            time.sleep(60)
        elif word in ("draw", "draw on"):
            segments = [Segment("image", np.ones(PICTURE, np.int64))]
            picture = Image.new("RGB", (16, 16), "red")
            yield SimpleNamespace(kind="image", value=picture, codes=segments[0].content)
            time.sleep(60 * (word == "draw on"))
        elif word == "slow":
            for number in range(1000):
                yield SimpleNamespace(kind="text", value=f"word{number} ")
                time.sleep(0.02)
        else:
            yield SimpleNamespace(kind="text", value="\x1b]0;mine\x07" if word == "esc" else word)
        yield SimpleNamespace(kind="reply", value=SimpleNamespace(
            segments=segments, ids=[1] * 3, prompt_tokens=self.count_tokens(prompt),
            finish_reason="length" if word == "cut" else "stop"))


def new_chat(out, model=None, way=None, **options) -> Chat:
    options = {"want": "any", "temperature": None, "seed": 0, "max_new_tokens": None} | options
    return Chat(model or FakeModel(), Path(out), options, lambda _, text: float(text), way)


@cli
def main() -> None:
    chat = new_chat(sys.argv[1], way=way_to_show())
    chat.run([])
    print([[message["role"], [part.content if part.modality == "text" else part.modality
                              for part in message["content"]]] for message in chat.messages])


if __name__ == "__main__":
    main()
