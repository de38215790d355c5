"""Image -> engine -> label map: decoding and resizing before, labels at the image's own size after."""
