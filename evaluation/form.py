"""Whether a reply is well formed, by code that shares nothing with the grammar and the tokenizers."""


def malformed(ids, vocabulary, want: str) -> str | None:
    """Why a reply is not well formed, or None. A well-formed one holds texts and whole spans, of the modality
    that was wanted, and nothing after the end of the turn."""
    ids, at, parts = [int(i) for i in ids], 0, []
    while at < len(ids):
        token, at = ids[at], at + 1
        if token in (vocabulary.end_of_turn, vocabulary.end_of_document):
            if at != len(ids):
                return "it goes on after its end"
            break
        if token < vocabulary.text_size:
            parts += ["text"] if parts[-1:] != ["text"] else []
            continue
        span = next((span for span in vocabulary.ranges if span.begin == token), None)
        if span is None:
            return f"id {token} cannot stand here"
        codes = range(span.codes_start, span.codes_start + span.codes)
        need = None
        if span.sized:
            sides = [token - span.sizes_start + 1 for token in ids[at : at + 2]]
            if len(sides) < 2 or not all(1 <= side <= span.sizes for side in sides):
                return f"{span.name}: no size"
            need, at = sides[0] * sides[1], at + 2
        start = at
        while at < len(ids) and ids[at] in codes:
            at += 1
        if at == len(ids) or ids[at] != span.end:
            return f"{span.name}: never closed"
        count, at = at - start, at + 1
        if count == 0 or (count != need if span.sized else count % span.rows):
            return f"{span.name}: {count} codes"
        parts.append(span.name)
    if want == "text" and set(parts) - {"text"}:
        return f"text was wanted, it holds {parts}"
    if want not in ("any", "text") and parts != [want]:
        return f"one {want} was wanted, it holds {parts}"
    return None
