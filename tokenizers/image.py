"""Pictures as a modality. Their tokenizer is in image_tokenizer.py, so that reading shards needs no torch."""

from PIL import Image

from onevocab.tokenizers.media import IMAGE_SUFFIXES, encode_png, image_ending, load_image
from onevocab.tokenizers.modality import Modality, Preview

PREVIEW_SIDE = 256  # pixels


def preview(picture: Image.Image) -> Preview:
    small = picture.copy()
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return Preview(f"{picture.width}x{picture.height}", "image/png", encode_png(small, level=9))


MODALITY = Modality(
    name="image", plural="pictures", sized=True, value="a PIL image",
    tokenizer_class="onevocab.tokenizers.image_tokenizer:ImageTokenizer",
    accepts=lambda value: isinstance(value, Image.Image), suffixes=IMAGE_SUFFIXES,
    shard_endings=("png", "jpg", "jpeg", "webp"), ending_of=image_ending, load=load_image, save=encode_png,
    to_shard=encode_png, preview=preview,
    measure=lambda picture: ("pixels of a picture's longer side", max(picture.size)),
    describe=("Describe the picture.", "What is in the picture?", "What do you see?", "Give a caption.",
              "What does the picture show?", "Tell me what is in this picture."),
    make=("Draw {caption}", "Draw this: {caption}", "Make a picture of {caption}", "Show me {caption}",
          "A picture, please: {caption}", "Paint {caption}"))
