"""What pages are made of: text that is escaped, and pictures and sounds that lie in the page itself."""

import base64
import html


def escape(text) -> str:
    """Safe inside an element and inside quotes; what is no Unicode (odd bytes in a name) becomes a question mark."""
    return html.escape(str(text).encode("utf-8", "replace").decode())


def data_uri(data: bytes, mime: str) -> str:
    """mime: "image/png", "audio/wav", ..."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def media_element(data: bytes, mime: str, label: str = "") -> str:
    """An element that shows a picture or plays a sound, the file's bytes within it."""
    if mime.startswith("image/"):
        return f'<img src="{data_uri(data, mime)}" alt="{escape(label)}">'
    return f'<audio controls preload="none" src="{data_uri(data, mime)}"></audio>'


def figure(data: bytes, mime: str, label: str, css_class: str = "") -> str:
    """The same with its label below."""
    attribute = f' class="{css_class}"' if css_class else ""
    return f"<figure{attribute}>{media_element(data, mime, label)}<figcaption>{escape(label)}</figcaption></figure>"
