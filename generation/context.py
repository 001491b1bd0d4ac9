"""What is sent when a conversation outgrows the context: the one rule, for every frontend.

The oldest exchanges are dropped, whole, until the answer has room; system turns and the newest message stay.
"""

from dataclasses import dataclass

from onevocab.common.errors import UserError


@dataclass
class Fitted:
    """messages: what to send, media as codes; dropped: exchanges left out, the oldest ones; prompt_tokens: what
    `messages` take; left: tokens that remain for the answer; reserved: tokens that it was to have. left < reserved
    only where the newest message (with the system turns) leaves no more.
    """

    messages: list[dict]
    dropped: int
    prompt_tokens: int
    left: int
    reserved: int


def reserve(model, want: str = "any", max_new_tokens: int | None = None) -> int:
    """Tokens kept free for an answer: the longest one, but at most a quarter of the context or, where a picture may be
    wanted, a whole picture; never more than `max_new_tokens`."""
    whole = [model.longest_reply(span.name) for span in model.vocab.ranges if span.sized and want in ("any", span.name)]
    room = max(min(model.longest_reply(want), model.context_length // 4), *whole, 1)
    return room if max_new_tokens is None else min(room, max_new_tokens)


def fit(model, prompt, want: str = "any", max_new_tokens: int | None = None) -> Fitted:
    """Leaves out the oldest exchanges until the answer to the last message has its `reserve`.

    An exchange is a user's turn with all that follows it up to the next one: neither half a turn nor an answer without
    its question is ever sent. What stays keeps its order. model: an `AnyToAny`; prompt: as it takes them. Raises
    UserError when the newest message does not fit alone.
    """
    messages = model.encode(prompt)
    exchange, numbers = 0, []  # of each message; 0: before any user's turn
    for message in messages:
        exchange += message["role"] == "user"
        numbers.append(exchange)
    reserved, oldest = reserve(model, want, max_new_tokens), min(numbers)
    for first in range(oldest, exchange + 1):
        kept = [message for message, number in zip(messages, numbers, strict=True)
                if number >= first or message["role"] == "system"]
        taken = model.count_tokens(kept)
        if taken + reserved <= model.context_length:
            break
    if taken >= model.context_length:
        raise UserError(f"the context is full: this message alone takes {taken} of {model.context_length} tokens; "
                        "shorten it")
    gone = {number for number, message in zip(numbers, messages, strict=True)
            if number < first and message["role"] != "system"}
    return Fitted(kept, len(gone), taken, model.context_length - taken, reserved)


def remark(model, reply, want: str = "any", max_new_tokens: int | None = None) -> str | None:
    """What a reader of a reply must be told: that it was cut (its finish_reason is "length"), by what, and what can be
    done; or that there is nothing in it. None where it is whole."""
    if reply.finish_reason != "length":
        empty = not any(part.modality != "text" or part.content for part in reply.segments)
        return "the answer is empty; ask in other words, or at a higher temperature" if empty else None
    allowed = model.longest_reply(want) if max_new_tokens is None else max_new_tokens
    if reply.prompt_tokens + allowed >= model.context_length:
        mend = ("shorten the prompt (in the chat: /reset)" if 2 * reply.prompt_tokens > model.context_length else
                "a model of a larger max_length has room for more")
        return (f"the answer was cut: its {len(reply.ids)} tokens and the prompt's {reply.prompt_tokens} fill the "
                f"context of {model.context_length}; {mend}")
    return f"the answer was cut at {allowed} new tokens; raise max_new_tokens (in the chat: /set max_new_tokens N)"
